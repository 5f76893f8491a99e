"""Dictionaries of items and categories: a dense id for each raw id, the item's category, and frequencies.

Dense ids are shuffled, so that equal ranges of rows of an embedding table carry equal load. Id 0 is the unknown.

I = items (arrays by dense id have an entry more, for the unknown), C = categories.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.hashing import mix
from schemas.errors import UserError
from schemas.events import UNKNOWN
from schemas.shards import dictionary_schema

BYTES_PER_ITEM = 100
"""Memory that the dictionaries take at their peak, measured."""


@dataclass(frozen=True)
class Dictionaries:
    """Items and categories of a data set, as tables for its readers and as arrays for the builder of shards."""

    category_I: NDArray[np.int32]
    """(I + 1,): dense category of each item, by dense id."""
    cumulative_I: NDArray[np.int64]
    """(I + 1,): sum of the frequencies of all items up to and including this one, by dense id."""
    items: pa.Table
    """The dictionary of items, in the order of raw ids."""
    categories: pa.Table
    """The dictionary of categories, in the order of raw ids."""
    changed: int
    """Number of items that were seen with several categories."""

    def write(self, folder: Path) -> None:
        """Write ``items.parquet`` and ``categories.parquet``."""
        for table, name in ((self.items, "items.parquet"), (self.categories, "categories.parquet")):
            pq.write_table(table, folder / name, compression="zstd", use_dictionary=False)


def build_dictionaries(items: pa.Table, changed: pa.Table, seed: int) -> Dictionaries:
    """Give dense ids to items and categories.

    Args:
        items: (item_id, frequency, smallest category, largest category) as ``definition.items`` has them, in any order.
        changed: (item_id, category_id) of the items whose smallest and largest category differ.
        seed: decides the shuffle.

    Raises:
        UserError: more items than 32-bit ids can name.
    """
    if len(items) >= 2**31 - 1:
        raise UserError(
            f"{len(items)} items: dense ids are 32-bit, at most {2**31 - 2} items fit; group rare ones before"
        )
    # Sorted by raw id: the engines give items in orders of their own, and the shuffle below starts from this one.
    items = items.select(["item_id", "frequency", "low"]).combine_chunks()
    order = np.argsort(items["item_id"].to_numpy())
    items = items.take(pa.array(order))
    raw_I = items["item_id"].to_numpy()
    frequency_I = items["frequency"].to_numpy().astype(np.int64)
    # The only category of an item, but for those in ``changed``, whose last one takes its place.
    raw_category_I = items["low"]
    if len(changed):
        index = pc.index_in(items["item_id"], changed["item_id"].combine_chunks())
        newer = changed["category_id"].combine_chunks().take(index.combine_chunks())
        raw_category_I = pc.if_else(pc.is_valid(newer), newer, raw_category_I)

    # The dictionary of categories is in the order of their raw ids, as that of items.
    names = pc.unique(raw_category_I).drop_null()
    names = names.take(pc.sort_indices(names))
    category_id_C = _shuffled_ids(len(names), seed, salt=1)
    index_I = pc.fill_null(pc.index_in(raw_category_I, names), -1)
    index_I = index_I.combine_chunks() if isinstance(index_I, pa.ChunkedArray) else index_I
    index_I = index_I.to_numpy(zero_copy_only=False)
    # An item without a category has the index -1, which takes the appended entry.
    category_I = np.where(index_I < 0, UNKNOWN, np.append(category_id_C, UNKNOWN)[index_I]).astype(np.int32)
    # bincount adds weights up in float64: exact below 2^53 events.
    category_frequency_C = np.bincount(index_I[index_I >= 0], frequency_I[index_I >= 0], len(names)).astype(np.int64)

    id_I = _shuffled_ids(len(raw_I), seed, salt=0)
    # Written to the places of the dense ids; place 0 keeps 0.
    by_id_category = np.zeros(len(raw_I) + 1, np.int32)
    by_id_category[id_I] = category_I
    by_id_frequency = np.zeros(len(raw_I) + 1, np.int64)
    by_id_frequency[id_I] = frequency_I
    text = not pa.types.is_integer(names.type)
    return Dictionaries(
        by_id_category,
        np.cumsum(by_id_frequency),
        pa.table([raw_I, id_I, frequency_I, category_I], schema=dictionary_schema(text=False, of_items=True)),
        pa.table([names, category_id_C, category_frequency_C], schema=dictionary_schema(text=text)),
        len(changed),
    )


def _shuffled_ids(count: int, seed: int, salt: int) -> NDArray[np.int32]:
    """The ids 1 .. count, shuffled: without this, ids given by age or popularity would load one shard most."""
    order = np.argsort(mix(mix(np.arange(count, dtype=np.uint64), seed), salt), kind="stable")
    ids = np.empty(count, np.int32)
    ids[order] = np.arange(1, count + 1, dtype=np.int32)
    return ids
