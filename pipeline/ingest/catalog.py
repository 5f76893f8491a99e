"""Dictionaries of items and categories: dense ids in a shuffled order, categories, frequencies."""

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
class Catalog:
    """What the builder of shards must know of items, indexed by dense id (I items and the unknown: I + 1 entries)."""

    category_I: NDArray[np.int32]
    """Dense category."""
    cumulative_I: NDArray[np.int64]
    """Sum of the frequencies of all items up to and including this one."""
    items: pa.Table
    """The dictionary of items, by raw id."""
    categories: pa.Table
    """The dictionary of categories, by raw id."""
    changed: int
    """Items that were seen with several categories."""

    def write(self, folder: Path) -> list[Path]:
        """Write the dictionaries; returns their paths."""
        paths = [folder / "items.parquet", folder / "categories.parquet"]
        for table, path in zip((self.items, self.categories), paths, strict=True):
            pq.write_table(table, path, compression="zstd", use_dictionary=False)
        return paths


def build_catalog(found: pa.Table, changed: pa.Table, seed: int) -> Catalog:
    """Give dense ids to items and categories.

    Args:
        found: (item_id, frequency, low, high), in any order.
        changed: (item_id, category_id) of the items whose ``low`` and ``high`` category differ.
        seed: of the shuffle.

    Raises:
        UserError: more items than 32-bit ids can name.
    """
    if len(found) >= 2**31 - 1:
        raise UserError(
            f"{len(found)} items: dense ids are 32-bit, at most {2**31 - 2} items fit; group rare ones before"
        )
    found = found.combine_chunks()
    raw_I = found["item_id"].to_numpy()
    order = np.argsort(raw_I)
    raw_I = raw_I[order]
    frequency_I = found["frequency"].to_numpy()[order].astype(np.int64)
    raw_category_I = found["low"].take(pa.array(order))
    if len(changed):
        position = pc.index_in(found["item_id"].take(pa.array(order)), changed["item_id"].combine_chunks())
        newer = changed["category_id"].combine_chunks().take(position.combine_chunks())
        raw_category_I = pc.if_else(pc.is_valid(newer), newer, raw_category_I)

    names = pc.unique(raw_category_I).drop_null()
    names = names.take(pc.sort_indices(names))
    category_id_C = _shuffled_ids(len(names), seed, salt=1)
    index_I = pc.fill_null(pc.index_in(raw_category_I, names), -1)
    index_I = index_I.combine_chunks() if isinstance(index_I, pa.ChunkedArray) else index_I
    index_I = index_I.to_numpy(zero_copy_only=False)
    category_I = np.where(index_I < 0, UNKNOWN, np.append(category_id_C, UNKNOWN)[index_I]).astype(np.int32)
    category_frequency_C = np.bincount(index_I[index_I >= 0], frequency_I[index_I >= 0], len(names)).astype(np.int64)

    id_I = _shuffled_ids(len(raw_I), seed, salt=0)
    by_id_category = np.zeros(len(raw_I) + 1, np.int32)
    by_id_category[id_I] = category_I
    by_id_frequency = np.zeros(len(raw_I) + 1, np.int64)
    by_id_frequency[id_I] = frequency_I
    text = not pa.types.is_integer(names.type)
    return Catalog(
        by_id_category,
        np.cumsum(by_id_frequency),
        pa.table([raw_I, id_I, frequency_I, category_I], schema=dictionary_schema(text=False, of_items=True)),
        pa.table([names, category_id_C, category_frequency_C], schema=dictionary_schema(text=text)),
        len(changed),
    )


def _shuffled_ids(count: int, seed: int, salt: int) -> NDArray[np.int32]:
    """Ids 1 .. count in a shuffled order, so that contiguous ranges of rows (row-wise shards) carry equal load."""
    order = np.argsort(mix(mix(np.arange(count, dtype=np.uint64), seed), salt), kind="stable")
    ids = np.empty(count, np.int32)
    ids[order] = np.arange(1, count + 1, dtype=np.int32)
    return ids
