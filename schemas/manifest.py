"""The manifest of a data set: counts, schema version, source fingerprints and a checksum of each file; written last."""

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from schemas.documents import inside, json_document, notice_unverified, read_json
from schemas.errors import UserError
from schemas.shards import READABLE_VERSIONS, FeatureRecord, RawType, Side, history_schema, shard_schema
from schemas.storage import RemotePath, local_copy, sha256

MANIFEST = "manifest.json"
ROW_GROUP_INDEX = "row_groups.parquet"
REMEDY = "prepare the data set again"
"""What to do about a data set that is damaged."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class File(_Record):
    """A file of the data set: ``path`` relative to the manifest, size, checksum."""

    path: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, **contents: Any) -> Self:
        """Return the record of a file that is written; ``contents`` are the other fields."""
        return cls(path=path.name, bytes=path.stat().st_size, sha256=sha256(path), **contents)


class Shard(File):
    """A shard, with what it holds."""

    users: int
    behaviors: int
    row_groups: int
    footer_sha256: str | None = None
    """Checksum of parquet's footer; None: an earlier version of this program wrote the data set."""
    row_group_crc32: str | None = None
    """CRC-32 of each row group, 8 digits each: a reader verifies what it reads, and need not read the whole file."""

    @classmethod
    def of(cls, path: Path, **contents: Any) -> Self:
        """Return the record of a shard that is written; ``contents`` are users, behaviors and row_groups."""
        import pyarrow.parquet as pq  # Not at the top: commands that only read a manifest begin at once.

        with path.open("rb") as file:
            footer = read_footer(file)
            metadata = pq.read_metadata(pa.BufferReader(footer))
            crc32 = ""
            for row_group in range(metadata.num_row_groups):
                start, end = row_group_range(metadata, row_group)
                file.seek(start)
                crc32 += f"{zlib.crc32(file.read(end - start)):08x}"
        checksum = hashlib.sha256(footer).hexdigest()
        return super().of(path, **contents, footer_sha256=checksum, row_group_crc32=crc32)


class Source(_Record):
    """An input file: its name, size in bytes and a fingerprint (see ``fingerprint``)."""

    name: str
    bytes: int
    fingerprint: str


class TargetCounts(_Record):
    """Number of targets of a split, and how many of them are positive."""

    targets: int
    positives: int


LEFT_OUT = {
    "filtered": "none of the values in {role}.keep",
    "outside_time": "not from {role}.since to {role}.until",
    "no_events": "of users without events",
    "below_min_behaviors": "of users with fewer behaviours than split.min_behaviors={min_behaviors}",
    "below_min_history": "fewer earlier behaviours than split.min_history={min_history}",
    "no_target": "of users without a target by split.kind={kind}, split.min_history={min_history}",
}
"""Why lines and users are left out, in the order in which reasons are looked for."""


class LogCounts(NamedTuple):
    """What became of the lines of a log: its role, lines read, reason -> lines left out, lines that repeat another."""

    role: str
    read: int
    left_out: dict[str, int]
    repeated: int

    @property
    def kept(self) -> int:
        """Lines that are in the data set."""
        return self.read - sum(self.left_out.values())


class Counts(_Record):
    """What the data set holds and what was left out on the way.

    ``events_read`` = ``behaviors`` - ``behaviors_carried`` + all of ``events_left_out``, and ``impressions_read`` =
    targets + all of ``impressions_left_out``. Data sets of schema version 1 do not say.
    """

    events: int
    """Events that the settings did not leave out line by line: those of all users, with a target or not."""
    events_read: int | None = None
    events_left_out: dict[str, int] = {}
    """Reason -> events; see `LEFT_OUT`."""
    events_repeated: int = 0
    """Events with the user, item and time of another one, that one not counted. They are kept."""
    impressions_read: int | None = None
    impressions_left_out: dict[str, int] = {}
    """Reason -> impressions; see `LEFT_OUT`."""
    impressions_repeated: int = 0
    """Impressions with the user, item, time and label of another one, that one not counted. They are kept."""
    impressions_unlabeled: dict[str, int] = {}
    """Name of a label but the main one -> impressions that were read without it."""
    impressions_contradictory: int = 0
    """Users, items and times for which there are impressions with both labels. They are kept."""
    users: int
    users_left_out: int
    users_left_out_by_reason: dict[str, int] = {}
    """Reason -> users; see `LEFT_OUT`."""
    behaviors: int
    behaviors_carried: int = 0
    """Those that earlier days of the chain have brought."""
    items: int
    """The largest id of an item: how many there are, or ``items.hash_buckets``."""
    items_below_min_count: int = 0
    """Those that are rarer than ``items.min_count``: they are unknown, and their features are known."""
    items_collided: int | None = None
    """With ``items.hash_buckets``, how many more raw ids there are than buckets that have any."""
    categories: int
    items_with_changed_category: int
    first_timestamp: int
    last_timestamp: int
    train: TargetCounts
    validation: TargetCounts
    test: TargetCounts

    def logs(self) -> list[LogCounts]:
        """What became of the lines of each log of which the data set says so."""
        logs = (
            ("events", self.events_read, self.events_left_out, self.events_repeated),
            ("impressions", self.impressions_read, self.impressions_left_out, self.impressions_repeated),
        )
        return [LogCounts(role, read, left_out, more) for role, read, left_out, more in logs if read is not None]


class Day(_Record):
    """A day of a chain: a data set that another one continues."""

    fingerprint: str
    """SHA-256 of its manifest."""
    first_timestamp: int
    """The earliest moment of its own events and impressions."""
    last_timestamp: int
    sources: tuple[str, ...]
    """Fingerprints of its input files."""


class Layer(_Record):
    """Files of behaviours of every user of some days, which later days go on from."""

    first_day: int
    """Number of the day in the chain, from 0."""
    last_day: int
    files: tuple[str, ...]
    """In the order of user keys."""
    users: int
    behaviors: int


class Chain(_Record):
    """What a data set knows of the days before it, so that another day can follow."""

    days: tuple[Day, ...] = ()
    """Those before this one, the first one first."""
    first_timestamp: int
    """The earliest moment of this day's own events and impressions."""
    last_timestamp: int
    rows: int | None
    """The largest row that an item has had, see `schemas.row_layout.RowLayout`; None: items are hashed."""
    new_items: int = 0
    """Items that no day before has."""
    new_users: int = 0
    """Users of this day's events and impressions who had no event before it."""
    evicted: int = 0
    """Items that have lost their row on this day."""
    rows_given: int = 0
    """Rows that items have got on this day, also of those that others have lost."""
    rows_free: int = 0
    """Rows that no item has now."""
    layers: tuple[Layer, ...]
    """The oldest first."""

    @property
    def number(self) -> int:
        """Number of this day, from 0."""
        return len(self.days)

    def summary(self) -> dict[str, Any]:
        """What a person is told of it, in types that JSON knows."""
        told = self.model_dump(mode="json", exclude={"days", "layers"})
        layers = [{"days": [layer.first_day, layer.last_day], "users": layer.users} for layer in self.layers]
        return {"day": self.number, **told, "layers": layers}


class Manifest(_Record):
    """What is in a data set's folder."""

    schema_version: int
    seed: int
    counts: Counts
    features: tuple[FeatureRecord, ...] = ()
    """What describes items, behaviours, users and impressions; read `declared`, which versions 1 and 2 have too."""
    labels: tuple[str, ...] = ("label",)
    """Names of the targets' labels, the main one first."""
    weighted: bool = False
    """Targets have weights."""
    user_type: RawType = "integer"
    item_type: RawType = "integer"
    item_rows: int | None = None
    """The largest id that the item table needs; None: the number of items. Items with larger ids are rarer than
    ``items.min_count``: their features are known, and they themselves are unknown."""
    placed_items: bool = False
    """Places of items in the table are others than their ids: they stand in `schemas.shards.ITEM_FEATURES`, column
    ``item``, and ``item_rows`` is the largest one."""
    chain: Chain | None = None
    """The days that this data set continues; None: no day can follow, see `without_events` too."""
    dictionaries_of: str | None = None
    """SHA-256 of the manifest of the data set whose dictionaries this one uses, without adding to them; with a chain
    that is the day before."""
    behaviors: tuple[str, ...] | None = None
    """In versions 1 and 2: behaviour types by dense id from 1, or None where the data has none."""
    scenes: tuple[str, ...] | None = None
    """In versions 1 and 2: scenes by dense id from 1, or None where the data has none."""
    settings: dict[str, Any]
    """The settings that the data set was prepared with, but for paths."""
    sources: tuple[Source, ...]
    impression_files: tuple[str, ...] = ()
    """Names of the impressions' files, which ``target_line`` counts from 0; empty where there are none, or none of
    schema version 2."""
    labeled: bool = True
    """Targets have labels; without, they are there to be scored alone."""
    skipped: tuple[str, ...] = ()
    """Corrupt input files that were left out, with the reason."""
    shards: tuple[Shard, ...]
    files: tuple[File, ...]
    """Dictionaries and the row-group index."""

    @property
    def declared(self) -> tuple[FeatureRecord, ...]:
        """Every feature of the data set, whatever its version."""
        if self.schema_version >= 3:
            return self.features
        category = FeatureRecord(
            name="category", of="item", kind="id", encoding="dictionary", rows=self.counts.categories
        )
        former = {"behavior": self.behaviors, "scene": self.scenes}
        return (
            category,
            *(
                FeatureRecord(
                    name=name,
                    of="behavior",
                    kind="id",
                    encoding="dictionary",
                    type="text",
                    rows=len(values),
                    target=name == "scene",
                )
                for name, values in former.items()
                if values is not None
            ),
        )

    def features_of(self, side: Side) -> tuple[FeatureRecord, ...]:
        """The features of items, of behaviours, of users or of impressions."""
        return tuple(feature for feature in self.declared if feature.of == side)

    @property
    def without_events(self) -> bool:
        """It has the impressions alone of a day of a chain, there to be scored: no day can follow."""
        return self.chain is not None and self.dictionaries_of is not None

    @property
    def largest_item(self) -> int:
        """The largest id that an item has in the item table."""
        return self.counts.items if self.item_rows is None else self.item_rows

    @property
    def shard_schema(self) -> pa.Schema:
        """Arrow schema of the shards."""
        if self.schema_version >= 3:
            return shard_schema(
                self.features,
                user_type=self.user_type,
                labels=self.labels,
                weighted=self.weighted,
                line=bool(self.impression_files),
            )
        return history_schema(
            behavior=self.behaviors is not None, scene=self.scenes is not None, line=bool(self.impression_files)
        )

    def write(self, folder: Path) -> None:
        """Write the manifest into ``folder``, as the last file of a data set. Equal manifests give equal bytes."""
        content = json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"
        (folder / MANIFEST).write_text(json_document(content))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifest of ``folder`` and check that its files are there with their sizes.

        Raises:
            UserError: no manifest, another schema version, a file that is missing or of another size.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise UserError(
                f"{folder}: no {MANIFEST}: not a data set, or one that was never finished; run `dare prepare`"
            )
        content = read_json(path, remedy=REMEDY)
        # Checked before the fields: a manifest of another version may lack any of them, and the message should say why.
        version = content.get("schema_version")
        if version not in READABLE_VERSIONS:
            raise UserError(
                f"{path}: schema version {version!r}, this program reads {' and '.join(map(str, READABLE_VERSIONS))}; "
                "prepare the data set again or use the program that wrote it"
            )
        try:
            manifest = cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"{path}: {where}: {first['msg']}; prepare the data set again") from None
        listed = {file.path for file in manifest.files}
        for name in (name for layer in (manifest.chain.layers if manifest.chain else ()) for name in layer.files):
            if name not in listed:
                raise UserError(f"{path}: chain.layers: {name!r} is none of its files; {REMEDY}")
        # Once for the data set, also where its manifest is new and lists shards of an earlier version.
        if any(None in (shard.footer_sha256, shard.row_group_crc32) for shard in manifest.shards):
            notice_unverified(folder)
        # Sizes alone, which cost no reading; `verify` reads all bytes.
        # Of a store with one listing, not with a question a file.
        remote = {path.name: size for path, size in folder.files().items()} if isinstance(folder, RemotePath) else None
        for file in (*manifest.shards, *manifest.files):
            path = inside(folder, file.path)
            if not (path.is_file() if remote is None else file.path in remote):
                raise UserError(
                    f"{folder}: {file.path} is missing, but stands in the manifest; prepare the data set again"
                )
            size = path.stat().st_size if remote is None else remote[file.path]
            if size != file.bytes:
                raise UserError(
                    f"{folder}: {file.path} is {size} bytes, in the manifest {file.bytes}; prepare the data set again"
                )
        return manifest

    def verify(self, folder: Path) -> None:
        """Compare every file's checksum with the manifest's.

        Raises:
            UserError: a file differs.
        """
        for file in (*self.shards, *self.files):
            _verify(folder, file)

    def verified(self, folder: Path, name: str) -> Path:
        """Return the path of a file beside the shards, a dictionary or the index, whose content has been verified.

        Of a data set at a URL, it is that of a copy on this machine.

        Raises:
            UserError: it differs from its checksum, or does not stand in the manifest.
        """
        file = next((file for file in self.files if file.path == name), None)
        if file is None:
            raise UserError(f"{folder}: {name} does not stand in {MANIFEST}; {REMEDY}")
        path = local_copy(folder / name, file.sha256)
        _verify(folder, file, path)
        return path


def data_set_fingerprint(folder: Path) -> str:
    """Return the SHA-256 of a data set's manifest, which has the checksums of all its other files."""
    # Of the bytes on disk, not of what was parsed: any other manifest is another data set.
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def _verify(folder: Path, file: File, path: Path | None = None) -> None:
    if sha256(path or folder / file.path) != file.sha256:
        raise UserError(f"{folder}: {file.path} differs from the checksum in the manifest; {REMEDY}")


def read_footer(file: BinaryIO) -> bytes:
    """Return the last bytes of a parquet file, with all that it says about itself; less where it is shorter."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    # The length of the metadata, then four letters.
    length = int.from_bytes(file.read(4), "little") + 8
    file.seek(max(0, size - length))
    return file.read(length)


def row_group_range(metadata: Any, row_group: int) -> tuple[int, int]:
    """Return where a row group begins and ends in its file.

    Args:
        metadata: of the file, `pyarrow.parquet.FileMetaData`.
        row_group: its number.
    """
    group = metadata.row_group(row_group)
    columns = [group.column(position) for position in range(group.num_columns)]
    # Dictionary pages come before those of the data.
    starts = [min(each.dictionary_page_offset or each.data_page_offset, each.data_page_offset) for each in columns]
    ends = [start + each.total_compressed_size for start, each in zip(starts, columns, strict=True)]
    return min(starts), max(ends)


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's size, first MiB and last MiB: tells inputs apart without reading terabytes."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        digest.update(stream.read(1 << 20))
        stream.seek(max(0, size - (1 << 20)))
        digest.update(stream.read())
    return digest.hexdigest()
