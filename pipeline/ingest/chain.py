"""The data set that another one goes on from: a day of a chain, or the owner of dictionaries that are used as they are.

Everything that is read of it is verified first. Nothing of it changes.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.ingest.encodings import Former, new_record
from pipeline.ingest.sources import LogFiles
from schemas.errors import UserError
from schemas.manifest import Day, Manifest, data_set_fingerprint, fingerprint
from schemas.prepare import PrepareSettings
from schemas.shards import ITEM_FEATURES, SCHEMA_VERSION, FeatureRecord
from schemas.storage import RemotePath

_ROWS = 1 << 17
"""Rows of a row group of `ITEM_VALUES`."""
ITEM_VALUES = "item_values.parquet"
"""Name of the file of raw values of items' features, ``key`` (the raw id, or the bucket) and a column ``f_NAME`` each:
what a later day says nothing of stays, and a value that is too rare today may be admitted then."""


@dataclass(frozen=True)
class Base:
    """A data set that is whole, its manifest read."""

    folder: Path
    manifest: Manifest
    fingerprint: str
    """SHA-256 of its manifest."""
    closed: bool
    """Its dictionaries are used as they are; else the day adds to them."""
    followed: bool
    """What is made follows it in time, with its histories (``--extend``); else it stands beside it
    (``--dictionaries``)."""
    _verified: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, *, closed: bool) -> Self:
        """Read the manifest of ``folder``.

        Raises:
            UserError: it is no data set, or not one that can be used so.
        """
        manifest = Manifest.read(folder)
        option = "--dictionaries" if closed else "--extend"
        if closed and manifest.schema_version < 3:
            raise UserError(
                f"{option} {folder}: schema version {manifest.schema_version}, 3 or later is needed; prepare it again"
            )
        if not closed and manifest.schema_version != SCHEMA_VERSION:
            raise UserError(
                f"{option} {folder}: schema version {manifest.schema_version}, which knows no days that follow each "
                f"other; prepare it again with history.keep=NUMBER"
            )
        if not closed and manifest.chain is None:
            raise UserError(
                f"{option} {folder}: no day can follow it; begin a chain with `dare prepare history.keep=NUMBER`"
            )
        if not closed and manifest.without_events:
            assert manifest.chain is not None
            raise UserError(
                f"{option} {folder}: it has impressions alone, to be scored, and no events, so no day can follow it; "
                f"extend day {manifest.chain.number - 1} of the chain, which it was made from"
            )
        return cls(folder, manifest, data_set_fingerprint(folder), closed, followed=not closed)

    def to_score(self) -> "Base":
        """Return this data set as what impressions alone follow: nothing is added to its dictionaries."""
        return replace(self, closed=True)

    @property
    def day(self) -> int:
        """Number in its chain of the day that follows."""
        assert self.manifest.chain is not None
        return self.manifest.chain.number + 1

    @property
    def days(self) -> tuple[Day, ...]:
        """All days so far, its own the last one."""
        chain = self.manifest.chain
        assert chain is not None
        own = Day(
            fingerprint=self.fingerprint,
            first_timestamp=chain.first_timestamp,
            last_timestamp=chain.last_timestamp,
            sources=tuple(source.fingerprint for source in self.manifest.sources),
        )
        return (*chain.days, own)

    @property
    def rows(self) -> int:
        """The largest row that an item has had."""
        assert self.manifest.chain is not None
        return self.manifest.chain.rows or 0

    def check(self, settings: PrepareSettings, out: Path, logs: list[LogFiles]) -> None:
        """Make sure, before anything is computed, that a data set can be made beside this one.

        Raises:
            UserError: the folders are in each other's way, the same files again, or features of another kind.
        """
        # Text of paths, so that those of a store are told apart too.
        paths = (self.folder, out)
        folder, new = (str(each) if isinstance(each, RemotePath) else os.path.realpath(each) for each in paths)
        if f"{new}/".startswith(f"{folder.rstrip('/')}/"):
            raise UserError(f"--out {out} is in {self.folder}, which stays as it is; choose another folder")
        if settings.without_events and not self.followed:
            raise UserError(f"--dictionaries {self.folder}: it has no histories to score with; name --events")
        if self.closed:
            if self.followed:
                return
            if settings.history.keep is not None:
                raise UserError("--dictionaries and history.keep: no day can follow such a data set; give one of them")
            self._check_features(settings)
            return
        chain = self.manifest.chain
        assert chain is not None
        known = {source: number for number, day in enumerate(self.days) for source in day.sources}
        for log, files in zip((settings.events, settings.impressions), logs, strict=False):
            # A log may hold several days, of which `since` takes one.
            if log is None or (log.since is not None and log.since > chain.last_timestamp):
                continue
            for path in files.paths:
                number = known.get(fingerprint(path))
                if number is not None:
                    raise UserError(
                        f"{files.role}: {path} is in day {number} of the chain already; give the files of the next "
                        f"day, or set {files.role}.since to take its later lines alone"
                    )

    def check_later(self, first: int) -> None:
        """Make sure that a day whose earliest moment is ``first`` follows the chain.

        Raises:
            UserError: it does not.
        """
        if not self.followed:
            return
        chain = self.manifest.chain
        assert chain is not None
        if first <= chain.last_timestamp:
            since = chain.last_timestamp + 1
            keys = f"impressions.since={since}" if self.closed else f"events.since={since} (and impressions.since)"
            raise UserError(
                f"--extend {self.folder}: its last event or impression is of {_moment(chain.last_timestamp)}, and the "
                f"day's first of {_moment(first)}: days follow each other, so it must be later; if single lines are "
                f"late, leave them out with {keys}"
            )

    def _check_features(self, settings: PrepareSettings) -> None:
        """Make sure that the declared features are encoded as those of this data set."""
        where = f"--dictionaries {self.folder}"
        items, hashed = self.manifest.item_type, _hashed(self.manifest)
        if items != settings.events.item_type:
            raise UserError(f"{where}: its items are {items}, and events.item_type={settings.events.item_type} here")
        if hashed != settings.items.hash_buckets:
            raise UserError(
                f"{where}: it has items.hash_buckets={_shown(hashed)}, here it is "
                f"{_shown(settings.items.hash_buckets)}; give the same"
            )
        here = {each.name: each for each in settings.declared_features}
        there = {each.name: each for each in self.manifest.features}
        # Every data set has a category; where none is declared, it is empty.
        for name in sorted((here.keys() ^ there.keys()) - {"category"}):
            having, lacking = ("here", "there") if name in here else ("there", "here")
            raise UserError(
                f"{where}: feature {name} is declared {having} and not {lacking}; declare the same features"
            )
        for name, feature in here.items():
            record, declared = there[name], new_record(feature, rows=0)
            for key in ("of", "kind", "encoding", "type", "scale"):
                if getattr(record, key) != getattr(declared, key):
                    raise UserError(
                        f"{where}: feature {name} has {key}={getattr(record, key)}, here it has "
                        f"{key}={getattr(declared, key)}; declare it alike"
                    )
            if feature.hash_buckets is not None and feature.hash_buckets != record.rows:
                raise UserError(f"{where}: feature {name} has hash_buckets={record.rows}, here {feature.hash_buckets}")

    def item_features(self) -> pa.Table:
        """What belongs to its items, mapped into memory."""
        return pa.ipc.open_file(pa.memory_map(str(self.verified(ITEM_FEATURES)))).read_all()

    def verified(self, name: str) -> Path:
        """The path on this machine of one of its files, whose content is verified once."""
        if name not in self._verified:
            self._verified[name] = self.manifest.verified(self.folder, name).absolute()
        return self._verified[name]

    def renamed(self, name: str, work: Path) -> Path:
        """One of its files, verified, under a name in the folder ``work`` that no file of the new data set has."""
        link = work / f"former_{name}"
        if not link.exists():
            link.symlink_to(self.verified(name))
        return link

    def former(self, record: FeatureRecord, *, counted_anew: bool) -> Former:
        """What the ids of one of its features go on from; see `Former`."""
        dictionary = bags = None
        if record.dictionary is not None:
            dictionary = pq.read_table(self.verified(record.dictionary))
        if record.bag_file is not None:
            bags = pa.ipc.open_file(pa.memory_map(str(self.verified(record.bag_file)))).read_all()
        return Former(record, dictionary, bags, self.closed, counted_anew)

    def memory_of(self, record: FeatureRecord) -> tuple[int, int]:
        """Entries of a feature's dictionary, and bytes of its raw values if these are text; 0 if it has none."""
        if record.dictionary is None:
            return 0, 0
        metadata = pq.read_metadata(self.verified(record.dictionary))
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        length = sum(group.column(0).total_uncompressed_size for group in groups) if record.type == "text" else 0
        return metadata.num_rows, length

    def record(self, name: str) -> FeatureRecord | None:
        """What its manifest says of a feature; None: it does not have it."""
        return next((each for each in self.manifest.features if each.name == name), None)


def write_batches(batches: Iterable[pa.RecordBatch], schema: pa.Schema, path: Path) -> None:
    """Write rows in row groups that do not depend on how the rows come in."""
    held, rows = [], 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in batches:
            # Engines have types of their own for text.
            held.append(pa.Table.from_batches([batch]).cast(schema))
            rows += len(batch)
            while rows >= _ROWS:
                table = pa.concat_tables(held).combine_chunks()
                writer.write_table(table.slice(0, _ROWS))
                held, rows = [table.slice(_ROWS)], rows - _ROWS
        if rows:
            writer.write_table(pa.concat_tables(held).combine_chunks())


def _hashed(manifest: Manifest) -> int | None:
    buckets = (manifest.settings.get("items") or {}).get("hash_buckets")
    return None if buckets is None else int(buckets)


def _shown(value: object) -> object:
    return "null" if value is None else value


def _moment(seconds: int) -> str:
    # Beside the number, because that is what settings take.
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC ({seconds})"
