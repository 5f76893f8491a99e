"""What gives raw values of a request their meaning: dictionaries and features of items of an exported model's data set.

I = items, by dense id, the unknown 0 included; X = values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.hashing import hash_values
from pipeline.ingest.encodings import encode_numbers
from pipeline.ingest.sets import decoded_sets
from pipeline.serve.dictionary import Dictionary, mapped_table
from pipeline.serve.sets import RequestBags
from schemas.errors import UserError
from schemas.served import REMEDY, ServedData, ServedManifest
from schemas.shards import ITEM_FEATURES, ITEM_PLACE, FeatureRecord, raw_type, value_type

I64 = NDArray[np.int64]
I32 = NDArray[np.int32]


class Words(Protocol):
    """Finds the dense ids of raw values."""

    def ids(self, values: pa.Array) -> I32:
        """Return ids, int32 (X,), 0 for what is missing or unknown."""
        ...


@dataclass(frozen=True)
class Vocabulary:
    """What a data set knows of raw values, as far as a model reads it."""

    data: ServedData
    words: Mapping[str, Words]
    """By ``item`` and the names of features with a dictionary."""
    columns_I: Mapping[str, NDArray[Any]]
    """Features of items that the model reads: int32 ids or numbers of bags, float32 numbers."""
    place_I: I32 | None
    """Where items lie in the table of items; None: at their ids."""
    bags: Mapping[str, tuple[NDArray[Any], I32]]
    """Sets of each feature of items that has several values: where each begins and ends, (B + 1,), and the ids."""

    @classmethod
    def open(cls, folder: Path, manifest: ServedManifest) -> Self:
        """Open what an exported model has of its data set; large files are mapped, not read.

        Raises:
            UserError: a file differs from its checksum, or does not hold what the manifest says.
        """
        data = manifest.data
        names = ["item", *(record.name for record in data.features if record.encoding == "dictionary")]
        files = {name: file for name in names if (file := manifest.dictionary(name)) is not None}
        words = {name: Dictionary.open(manifest.verified(folder, file)) for name, file in files.items()}
        for record in data.features:
            if record.name in data.read and record.encoding == "dictionary" and record.name not in words:
                raise UserError(f"{folder}: no dictionary of {record.name}; {REMEDY}")
        read = [record for record in data.features if record.of == "item" and record.name in data.read]
        columns_I: dict[str, NDArray[Any]] = {}
        place_I = None
        if read or data.placed_items:
            table = mapped_table(manifest.verified(folder, ITEM_FEATURES))
            columns_I = {each.name: _flat(folder, table, each.name, data.items + 1, value_type(each)) for each in read}
            if data.placed_items:
                place_I = _flat(folder, table, ITEM_PLACE, data.items + 1, pa.int32())
        bags = {}
        for record in read:
            if record.bag_file is not None:
                lists = mapped_table(manifest.verified(folder, record.bag_file))["ids"].combine_chunks()
                bags[record.name] = (lists.offsets.to_numpy(), lists.values.to_numpy())
        return cls(data, words, columns_I, place_I, bags)

    def record(self, name: str) -> FeatureRecord:
        """What the data set says of a feature."""
        return next(record for record in self.data.features if record.name == name)

    def items(self, raw: pa.Array) -> I32:
        """Dense ids of items, 0 for those that are unknown.

        Args:
            raw: (X,) raw ids, or their hashes where items are hashed.
        """
        if self.data.items_hashed:
            row_X: I32 = (raw.to_numpy() % self.data.items + 1).astype(np.int32)
            return row_X
        return self.words["item"].ids(raw)

    def rows_of_items(self, item_X: I32) -> I32:
        """Rows of items in the model's table, 0 for those that have none."""
        if self.place_I is not None:
            row_X: I32 = self.place_I.take(item_X)
            return row_X
        return np.where(item_X > self.data.largest_item, np.int32(0), item_X)

    def of_items(self, record: FeatureRecord, item_X: I32, bags: RequestBags | None) -> NDArray[Any]:
        """A feature of items by dense id: int32 ids or, of sets, numbers of ``bags``; float32 numbers."""
        value_X: NDArray[Any] = self.columns_I[record.name].take(item_X)
        if bags is None:
            return value_X
        offset_B1, id_E = self.bags[record.name]
        number_D, bag_X = np.unique(value_X, return_inverse=True)
        start_D = offset_B1[number_D].astype(np.int64)
        length_D = offset_B1[number_D + 1] - start_D
        # Ids of each of the bags, one after the other.
        shift_D = start_D - (np.cumsum(length_D) - length_D)
        index_E = np.repeat(shift_D, length_D) + np.arange(int(length_D.sum()))
        return bags.add(length_D, id_E[index_E], bag_X)

    def encoded(self, record: FeatureRecord, values: pa.Array, bags: RequestBags | None) -> NDArray[Any]:
        """Values of a feature as `pipeline.ingest.conversion.converted` makes them, as a model sees them.

        Args:
            record: of the feature.
            values: (X,), null where one is missing.
            bags: of the feature, where it has several values.

        Returns:
            (X,) int32 ids or numbers of ``bags``, 0 for what is missing or unknown; float32 numbers.
        """
        if record.kind == "number":
            return encode_numbers(record, numbers_of(values))
        if bags is None:
            return self._ids(record, values)
        coded = values.dictionary_encode()
        lists = decoded_sets(coded.dictionary)
        kind = pa.int64() if record.encoding == "hash" else raw_type(record.type or "text")
        id_E = self._ids(record, lists.values.cast(kind))
        length_B = np.diff(lists.offsets.to_numpy())
        parent_E = np.repeat(np.arange(len(lists)), length_B)
        # One bag more, which stays empty, for what is missing.
        bag_X = pc.fill_null(coded.indices, len(lists)).to_numpy().astype(np.int64)
        return bags.add_sets(id_E, parent_E, len(lists) + 1, bag_X)

    def _ids(self, record: FeatureRecord, values: pa.Array) -> I32:
        if record.encoding == "hash":
            known = values.is_valid().to_numpy(zero_copy_only=False)
            hashed = pc.fill_null(values, 0).to_numpy()
            return np.where(known, hashed % record.rows + 1, 0).astype(np.int32)
        return self.words[record.name].ids(values)

    def knows(self, record: FeatureRecord) -> bool:
        """Whether values of a feature can be encoded: the model reads it, or its encoding needs no dictionary."""
        return record.encoding != "dictionary" or record.name in self.words

    def allowed(self, record: FeatureRecord, wanted: tuple[str | int, ...]) -> NDArray[np.bool_]:
        """Whether each id of a feature, (rows + 1,), is that of a value which a sequence asks for."""
        texts = [str(value) for value in wanted]
        allowed = np.zeros(record.rows + 1, np.bool_)
        if record.encoding == "buckets":
            # Quantiles have no names but their numbers.
            allowed[[int(text) for text in texts]] = True
            return allowed
        raw = pa.array(
            texts if record.type == "text" else [int(text) for text in texts], raw_type(record.type or "text")
        )
        allowed[self._ids(record, hash_values(raw) if record.encoding == "hash" else raw)] = True
        # The unknown belongs to no sequence that asks for something.
        allowed[0] = False
        return allowed


def numbers_of(values: pa.Array) -> NDArray[np.float64]:
    """Numbers as an array, NaN where one is missing."""
    number: NDArray[np.float64] = pc.fill_null(values, float("nan")).to_numpy()
    return number


def _flat(folder: Path, table: pa.Table, name: str, rows: int, kind: pa.DataType) -> NDArray[Any]:
    """A column of the features of items, which has a value for each item."""
    if name not in table.column_names or table.schema.field(name).type != kind or len(table) != rows:
        raise UserError(f"{folder / ITEM_FEATURES}: column {name} is missing, of another type or length; {REMEDY}")
    values: NDArray[Any] = table[name].combine_chunks().to_numpy()
    return values
