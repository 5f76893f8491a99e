"""A data set's folder as the stream sees it: manifest, index of row groups, where to read, and what lies beside shards.

G = row groups, in file order; I = items, by dense id, the unknown 0 included; X = any shape.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from weakref import WeakValueDictionary

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from embeddings.batch import Bags
from pipeline.stream.reader import RowGroupAddress
from pipeline.stream.row_group import check_values, flat_column, list_column
from schemas.errors import UserError
from schemas.manifest import MANIFEST, REMEDY, ROW_GROUP_INDEX, Manifest, data_set_fingerprint
from schemas.shards import ITEM_FEATURES, ITEM_PLACE, ROW_GROUPS, SPLITS, FeatureRecord, value_type

I64 = NDArray[np.int64]
BUILT_IN = frozenset({"item", "position", "interval"})
"""Features that a model has of every data set; no file has a column of them by name."""


@dataclass(frozen=True)
class ItemFeatures:
    """What belongs to items: a column a feature, mapped from the file where it is one."""

    columns_I: Mapping[str, NDArray[Any]]
    """By name: int32, ids or numbers of bags; float32, numbers that stay numbers."""
    table: pa.Table | None = None
    """What columns are mapped from: as long as somebody has it, others need not verify the file again."""

    def of(self, item_X: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
        """The features of items by dense id, each (X)."""
        return {name: column_I.take(item_X) for name, column_I in self.columns_I.items()}


_OPENED: WeakValueDictionary[tuple[Path, str, str], Any] = WeakValueDictionary()
"""What is verified and mapped once for all streams of a data set that are open: by folder, fingerprint and name."""


@dataclass(frozen=True)
class DataSet:
    """Manifest and index of row groups, checked against each other."""

    folder: Path
    manifest: Manifest
    fingerprint: str
    """SHA-256 of the manifest, which holds the checksums of all other files."""
    file_G: I64
    """The shard's index in the manifest."""
    row_group_G: I64
    """Number of the row group in its shard."""
    users_G: I64
    behaviors_G: I64
    """Behaviours of the row group's users, all together."""
    targets_G: dict[str, I64]
    """Number of targets, by split."""

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read the manifest and the index of ``folder``; shards are not opened.

        Raises:
            UserError: not a data set, of another schema version, or its parts do not match.
        """
        manifest = Manifest.read(folder)
        index = _read_index(manifest.verified(folder, ROW_GROUP_INDEX))
        columns = {name: index[name].to_numpy().astype(np.int64) for name in ROW_GROUPS.names}
        file_G, users_G = columns["file"], columns["users"]
        shards = len(manifest.shards)
        counts = manifest.counts
        # The range of file numbers comes first: numpy's bincount raises on a negative one, and the rest is not looked
        # at.
        agrees = (
            bool(np.all((file_G >= 0) & (file_G < shards)))
            and np.array_equal(np.bincount(file_G, minlength=shards), [shard.row_groups for shard in manifest.shards])
            and np.array_equal(np.bincount(file_G, users_G, shards), [shard.users for shard in manifest.shards])
            and int(columns["behaviors"].sum()) == counts.behaviors
            and all(int(columns[split].sum()) == getattr(counts, split).targets for split in SPLITS)
        )
        if not agrees:
            raise UserError(f"{folder}: {ROW_GROUP_INDEX} does not match {MANIFEST}; prepare the data set again")
        return cls(
            folder,
            manifest,
            data_set_fingerprint(folder),
            file_G,
            columns["row_group"],
            users_G,
            columns["behaviors"],
            {split: columns[split] for split in SPLITS},
        )

    def schema(self, *, lines: bool = False, features: Collection[str] | None = None) -> pa.Schema:
        """Arrow schema of what is read of the shards.

        Args:
            lines: with ``target_line``, where the data set has it.
            features: names of the features that are read; None: all.
        """
        left_out = {"target_line"} - ({"target_line"} if lines else set())
        for feature in self.manifest.declared:
            if features is not None and feature.name not in features:
                left_out |= {f"{side}_{feature.name}" for side in ("user", "history", "target")}
        return pa.schema([field for field in self.manifest.shard_schema if field.name not in left_out])

    def feature(self, name: str) -> FeatureRecord:
        """What the manifest says of a feature.

        Raises:
            UserError: the data set does not have it.
        """
        declared = {feature.name: feature for feature in self.manifest.declared}
        if name not in declared:
            raise UserError(
                f"{self.folder}: no feature {name}; it has {', '.join(declared)}: prepare the data set with that "
                "column, or leave the feature out"
            )
        return declared[name]

    def address(self, group: int) -> RowGroupAddress:
        """Say where row group ``group`` (in file order over all shards) is."""
        shard = self.manifest.shards[self.file_G[group]]
        return RowGroupAddress(self.folder / shard.path, int(self.row_group_G[group]), shard)

    @property
    def first_user_G(self) -> I64:
        """Number of the first user of each row group, counted over all shards from 0."""
        return np.cumsum(self.users_G) - self.users_G

    def dictionaries(self) -> dict[str, Any]:
        """What gives ids their meaning, as JSON knows it: checksums of dictionary files, vocabularies, encodings.

        Two data sets whose features have equal entries here have equal ids of them.
        """
        checksums = {file.path: file.sha256 for file in self.manifest.files}
        items = checksums.get("items.parquet")
        if self.manifest.schema_version < 3:
            behaviors, scenes = self.manifest.behaviors, self.manifest.scenes
            return {
                "items": items,
                "categories": checksums.get("categories.parquet"),
                "behaviors": None if behaviors is None else list(behaviors),
                "scenes": None if scenes is None else list(scenes),
            }
        place_I = self.item_places()
        return {
            "items": items,
            # Rarer items have no row: the table's size gives ids their meaning too.
            "item_rows": self.manifest.largest_item,
            **({} if place_I is None else {"places": hashlib.sha256(place_I.data).hexdigest()}),
            "features": {
                feature.name: encoding(feature)
                | ({} if feature.dictionary is None else {"dictionary": checksums.get(feature.dictionary)})
                for feature in self.manifest.declared
            },
        }

    def largest_ids(self) -> dict[str, int]:
        """The largest number that each column of ids has: of items, features, and, of sets of ids, the sets."""
        # Ids begin at 1, with 0 for the unknown: the largest one is the number of different values.
        return {"item": self.manifest.counts.items} | {
            feature.name: feature.rows if feature.bags is None else feature.bags
            for feature in self.manifest.declared
            if not feature.is_number
        }

    def names(self, feature: str) -> pa.Array:
        """Raw values by id, text or int64; null for the unknown 0, and where an id has no raw value of its own.

        Args:
            feature: ``item``, or the name of a feature that has a dictionary.

        Returns:
            (largest id + 1,).

        Raises:
            UserError: the data set has no such feature or no such dictionary, or it cannot be read.
        """
        manifest = self.manifest
        former = {"behavior": manifest.behaviors, "scene": manifest.scenes, "category": None, "item": None}
        if feature == "item":
            file, rows = "items.parquet", manifest.counts.items
        else:
            record = self.feature(feature)
            rows = record.rows
            if manifest.schema_version < 3:
                values = former[feature]
                if values is not None:
                    return pa.array([None, *values], pa.string())
                file = "categories.parquet"
            elif record.dictionary is None:
                raise UserError(f"{self.folder}: feature {feature} has no dictionary: its values are {record.encoding}")
            else:
                file = record.dictionary
        path = manifest.verified(self.folder, file)
        table = read_dictionary(path)
        if manifest.chain is not None or manifest.dictionaries_of is not None:
            # Values that are not admitted yet are counted on under the id 0.
            table = table.filter(pc.greater(table["id"], 0))
        id_N = table["id"].to_numpy()
        if len(id_N) and not 1 <= id_N.min() <= id_N.max() <= rows:
            raise UserError(f"{path}: ids from {id_N.min()} to {id_N.max()}, the manifest allows 1 to {rows}; {REMEDY}")
        # The file is sorted by raw id; here is the row of each dense id, and none for id 0.
        row = np.full(rows + 1, -1)
        row[id_N] = np.arange(len(id_N))
        return table["raw_id"].combine_chunks().take(pa.array(row, mask=row < 0))

    def item_features(self, features: Collection[str] | None = None) -> ItemFeatures:
        """Features of items that do not stand in the shards: none of versions 1 and 2.

        Args:
            features: names of those that are wanted; None: all.

        Raises:
            UserError: the file differs from its checksum, or does not hold what the manifest says.
        """
        wanted = [each for each in self.manifest.features_of("item") if features is None or each.name in features]
        if self.manifest.schema_version < 3 or not wanted:
            return ItemFeatures({})
        table, largest = self._mapped(ITEM_FEATURES), self.largest_ids()
        columns = {
            each.name: self._of_items(table, each.name, value_type(each), largest.get(each.name)) for each in wanted
        }
        return ItemFeatures(columns, table)

    def item_places(self) -> NDArray[np.int32] | None:
        """Where each item lies in the table of items, int32 (I,), 0: nowhere; None: items lie at their ids.

        Raises:
            UserError: the file differs from its checksum, or does not hold what the manifest says.
        """
        if not self.manifest.placed_items:
            return None
        table = self._mapped(ITEM_FEATURES)
        place_I: NDArray[np.int32] = self._of_items(table, ITEM_PLACE, pa.int32(), self.manifest.largest_item)
        if place_I[0]:
            raise UserError(f"{self.folder / ITEM_FEATURES}: column {ITEM_PLACE} gives the unknown a place; {REMEDY}")
        return place_I

    def _of_items(self, table: pa.Table, name: str, kind: pa.DataType, largest: int | None) -> NDArray[Any]:
        """A column of `ITEM_FEATURES`, checked."""
        where = f"{self.folder / ITEM_FEATURES}: column {name}"
        if name not in table.column_names or table.schema.field(name).type != kind:
            raise UserError(f"{where} is missing or of another type; {REMEDY}")
        if len(table) != self.manifest.counts.items + 1:
            raise UserError(
                f"{where} has {len(table)} rows, the manifest says {self.manifest.counts.items} items; {REMEDY}"
            )
        try:
            column_I: NDArray[Any] = flat_column(name, table[name]).to_numpy()
            check_values(name, column_I, largest)
        except UserError as error:
            raise UserError(f"{self.folder / ITEM_FEATURES}: {error}; {REMEDY}") from None
        return column_I

    @property
    def days_before(self) -> list[str]:
        """Fingerprints of the days that it continues, the first one first."""
        return [day.fingerprint for day in self.manifest.chain.days] if self.manifest.chain else []

    def continues(self, other: Self) -> bool:
        """Whether each id of ``other`` means here what it means there: it is a day before, or has the dictionaries."""
        return other.fingerprint in (self.manifest.dictionaries_of, *self.days_before)

    def lineage(self) -> dict[str, Any]:
        """What tells which data sets this one follows, as JSON knows it: nothing of one that stands alone."""
        of = self.manifest.dictionaries_of
        return ({"days": self.days_before} if self.manifest.chain else {}) | ({"dictionaries_of": of} if of else {})

    def bags(self, features: Collection[str] | None = None) -> dict[str, Bags]:
        """By name of each feature of several values, its sets of ids; the same objects for all streams that are open.

        Args:
            features: names of those that are wanted; None: all.

        Raises:
            UserError: a file differs from its checksum, or does not hold what the manifest says.
        """
        return {
            feature.name: self._bags(feature)
            for feature in self.manifest.declared
            if feature.kind == "ids" and (features is None or feature.name in features)
        }

    def _bags(self, feature: FeatureRecord) -> Bags:
        assert feature.bag_file is not None
        key = (self.folder, self.fingerprint, f"Bags of {feature.name}")
        bags: Bags | None = _OPENED.get(key)
        if bags is None:
            table, where = self._mapped(feature.bag_file), self.folder / feature.bag_file
            try:
                if table.column_names != ["ids"] or table.schema.field("ids").type.value_type != pa.int32():
                    raise UserError("no column ids of lists of int32")
                offset_B1, id_E = list_column("ids", table["ids"])
                check_values("ids", id_E, feature.rows)
                if len(offset_B1) != (feature.bags or 0) + 2 or (len(offset_B1) > 1 and offset_B1[1]):
                    raise UserError(f"{len(offset_B1) - 1} sets; the empty one and {feature.bags} are expected")
                # Within each set ids ascend and none is the unknown one.
                ascends_E = np.diff(id_E, prepend=0) > 0
                ascends_E[offset_B1[:-1][np.diff(offset_B1) > 0]] = True
                if not ascends_E.all() or (len(id_E) and id_E.min() < 1):
                    raise UserError("a set whose ids do not ascend from 1")
            except UserError as error:
                raise UserError(f"{where}: {error}; {REMEDY}") from None
            # A copy: tensors do not know memory that nobody may write to.
            bags = _OPENED[key] = Bags(torch.from_numpy(offset_B1), torch.from_numpy(id_E.copy()))
        return bags

    def _mapped(self, name: str) -> pa.Table:
        """A file of Arrow's beside the shards, verified when it is opened first and mapped into memory."""
        key = (self.folder, self.fingerprint, name)
        table: pa.Table | None = _OPENED.get(key)
        if table is None:
            path = self.manifest.verified(self.folder, name)
            try:
                table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); {REMEDY}") from None
            _OPENED[key] = table
        return table


def read_dictionary(file: Path) -> pa.Table:
    """Raw and dense ids of a dictionary, (raw_id, id).

    Raises:
        UserError: it cannot be read.
    """
    try:
        return pq.read_table(file, columns=["raw_id", "id"])
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read ({' '.join(str(error).split())}); {REMEDY}") from None


def encoding(feature: FeatureRecord) -> dict[str, Any]:
    """How raw values of a feature become what a model sees, but for the dictionary, as JSON knows it."""
    said = feature.model_dump(mode="json", include={"kind", "encoding", "type", "edges", "mean", "deviation", "scale"})
    if feature.encoding == "hash":
        said["rows"] = feature.rows
    return {name: value for name, value in said.items() if value is not None}


def _read_index(path: Path) -> pa.Table:
    try:
        index = pq.read_table(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; prepare the data set again") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); prepare the data set again") from None
    wrong = [
        field.name for field in ROW_GROUPS if not index.schema.equals(ROW_GROUPS) and field not in list(index.schema)
    ]
    if wrong:
        raise UserError(f"{path}: columns missing or of another type: {', '.join(wrong)}; prepare the data set again")
    return index
