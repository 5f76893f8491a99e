"""The dictionary of items: a dense id for each raw id, what belongs to the item, and frequencies.

Dense ids are shuffled, so that equal ranges of rows of an embedding table carry equal load. Id 0 is the unknown.

I = items (arrays by dense id have an entry more, for the unknown).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.ingest.columns import feature_column
from pipeline.ingest.encodings import admitted, encode_numbers, shuffled_ids, write_arrow
from schemas.errors import UserError
from schemas.prepare import Items
from schemas.shards import ITEM_FEATURES, FeatureRecord, RawType, dictionary_schema, value_type

BYTES_PER_ITEM = 100
"""Memory that the dictionary takes at its peak, measured: for integers, with the first feature."""
BYTES_PER_FEATURE = 12
"""Memory of an item's further features."""


_FREQUENT, _RARE = 0, 2
"""What shuffles ids of items that are frequent enough for a row of their own, and of the others."""


@dataclass(frozen=True)
class Dictionary:
    """Items of a data set: as a table for its readers and as an array for the builder of shards."""

    cumulative_I: NDArray[np.int64]
    """(I + 1,): sum of the frequencies of all items up to and including this one, by dense id."""
    items: pa.Table
    """Schema `schemas.shards.dictionary_schema`, in the order of raw ids."""
    features: pa.Table
    """(I + 1 rows): what belongs to each item, by dense id, a column a feature, and in a chain of days its place."""
    table_rows: int
    """The largest id, or place, that the item table needs."""
    without_row: int
    """Items that are too rare for a row of their own, or that the data set whose dictionary is used gives none."""
    new_items: int = 0
    """Items that no day before has, or that the data set whose dictionary is used does not know."""
    rows: int | None = None
    """In a chain of days, the largest row that an item has had; None: items are hashed."""
    rows_given: int = 0
    """Rows that items have got."""
    rows_free: int = 0
    """Rows that no item has."""
    evicted: int = 0
    """Items that have lost their row."""

    def write(self, folder: Path) -> None:
        """Write ``items.parquet`` and `ITEM_FEATURES`."""
        pq.write_table(self.items, folder / "items.parquet", compression="zstd", use_dictionary=False)
        write_arrow(self.features, folder / ITEM_FEATURES)


def build_dictionary(
    items: pa.Table, features: Sequence[FeatureRecord], settings: Items, kind: RawType, seed: int
) -> Dictionary:
    """Give dense ids to items.

    Args:
        items: (key, frequency, column of each feature with ids and raw numbers) of every item, by key.
        features: those of items.
        settings: which items are admitted; with ``hash_buckets``, keys are ids.
        kind: of raw ids.
        seed: decides the shuffle.

    Raises:
        UserError: more items than 32-bit ids can name.
    """
    items = items.combine_chunks()
    frequency_I = items["frequency"].to_numpy().astype(np.int64)
    if settings.hash_buckets is not None:
        id_I, count = items["key"].to_numpy().astype(np.int32), settings.hash_buckets
        rows, raw_I = count, pa.nulls(len(items), pa.string() if kind == "text" else pa.int64())
    else:
        check_count(len(items))
        id_I, rows = first_ids(frequency_I, settings.min_count, seed)
        count, raw_I = len(items), items["key"]
    hashed = settings.hash_buckets is not None
    schema = pa.schema([pa.field(each.name, value_type(each), nullable=False) for each in features])
    return Dictionary(
        cumulative(frequency_I, id_I, count),
        pa.table([raw_I, id_I, frequency_I], schema=dictionary_schema(text=kind == "text", hashed=hashed)),
        pa.table({each.name: by_id(each, items, id_I, count) for each in features}, schema=schema),
        rows,
        count - rows,
    )


def check_count(items: int) -> None:
    """Make sure that 32-bit ids can name so many items.

    Raises:
        UserError: they cannot.
    """
    if items >= 2**31 - 1:
        raise UserError(f"{items} items: dense ids are 32-bit, at most {2**31 - 2} items fit; set items.hash_buckets")


def first_ids(frequency_I: NDArray[np.int64], min_count: int, seed: int) -> tuple[NDArray[np.int32], int]:
    """Ids of items that come in the order of raw ids, the frequent ones first; and how many of those there are."""
    # The shuffle starts from one order, whatever computed the items.
    frequent_I = admitted(frequency_I, min_count)
    rows = int(frequent_I.sum())
    id_I = np.empty(len(frequency_I), np.int32)
    id_I[frequent_I] = shuffled_ids(rows, seed, _FREQUENT)
    id_I[~frequent_I] = rows + shuffled_ids(len(id_I) - rows, seed, _RARE)
    return id_I, rows


def cumulative(frequency_I: NDArray[np.int64], id_I: NDArray[np.int32], count: int) -> NDArray[np.int64]:
    """Sums of frequencies by dense id, see `Dictionary.cumulative_I`."""
    by_id_frequency = np.zeros(count + 1, np.int64)
    by_id_frequency[id_I] = frequency_I
    return np.cumsum(by_id_frequency)


def by_id(record: FeatureRecord, items: pa.Table, id_I: NDArray[np.int32], count: int) -> NDArray[Any]:
    """A feature of items by dense id; 0 for the unknown, and for what no item is."""
    if feature_column(record.name) not in items.column_names:
        return np.zeros(count + 1, value_type(record).to_pandas_dtype())
    # Null: items of another data set, of which this one says nothing.
    value_I = items[feature_column(record.name)].fill_null(0).to_numpy()
    if record.kind == "number":
        value_I = encode_numbers(record, value_I)
    of_id = np.zeros(count + 1, value_I.dtype)
    of_id[id_I] = value_I
    return of_id
