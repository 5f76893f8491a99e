"""The dictionary of items where something came before, or more days follow: ids that stay, rows, places.

I = items (arrays by dense id have an entry more, for the unknown).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.ingest.dictionaries import Dictionary, by_id, check_count, cumulative, first_ids
from pipeline.ingest.encodings import admitted, shuffled_ids
from pipeline.ingest.rows import ItemRows, assign_rows
from schemas.prepare import Items
from schemas.row_layout import RowLayout
from schemas.shards import ITEM_PLACE, FeatureRecord, RawType, dictionary_schema, value_type

BYTES_PER_ITEM_OF_DAYS = 60
"""Memory that an item takes at the peak beside `dictionaries.BYTES_PER_ITEM`."""
_NEW = 3
"""What shuffles ids of items that are new on a day."""


@dataclass(frozen=True)
class ItemDay:
    """The day of a chain that is made."""

    number: int
    """From 0."""
    now: int
    """Its last moment."""
    ids: int
    """The largest id that an item has so far."""
    rows: int
    """The largest row that an item has had so far."""


def build_day(
    items: pa.Table, features: Sequence[FeatureRecord], settings: Items, kind: RawType, seed: int, day: ItemDay
) -> Dictionary:
    """The dictionary of a day's numbered items: new ones get ids, and those that are frequent enough rows.

    Args:
        items: what `definition.with_former_items` says of every item, by key; on day 0 (key, frequency, last_seen,
            columns of features).
        features: those of items.
        settings: which items are admitted and evicted.
        kind: of raw ids.
        seed: decides the shuffle.
        day: which one it is.

    Raises:
        UserError: more items than 32-bit ids can name.
    """
    items = items.combine_chunks()
    count = len(items)
    check_count(count)
    frequency_I, last_seen_I = (items[name].to_numpy().astype(np.int64) for name in ("frequency", "last_seen"))
    if day.number:
        id_I, new = _ids_after(items, day.ids, seed)
        seen_I, row_I, day_I = (_column(items, name) for name in ("seen", "row", "row_day"))
    else:
        id_I, _ = first_ids(frequency_I, settings.min_count, seed)
        new, seen_I = count, np.ones(count, np.int32)
        row_I = day_I = np.zeros(count, np.int32)
    # Rows go by id: from here on items stand in that order.
    at_I = np.empty(count, np.int64)
    at_I[id_I - 1] = np.arange(count)
    frequent_I = admitted(frequency_I, settings.min_count)
    rows = assign_rows(
        ItemRows(row_I[at_I], day_I[at_I], day.rows),
        wanted_I=((seen_I > 0) & frequent_I)[at_I],
        frequency_I=frequency_I[at_I],
        last_seen_I=last_seen_I[at_I],
        now=day.now,
        day=day.number,
        eviction=settings.evict,
    )
    layout = RowLayout.of(rows.largest)
    columns = {each.name: by_id(each, items, id_I, count) for each in features}
    columns[ITEM_PLACE] = layout.place(np.concatenate([np.zeros(1, np.int32), rows.row_I]))
    listed = [items["key"], id_I, frequency_I, last_seen_I, rows.row_I[id_I - 1], rows.day_I[id_I - 1]]
    return Dictionary(
        cumulative(frequency_I, id_I, count),
        pa.table(listed, schema=dictionary_schema(text=kind == "text", of_days=True)),
        pa.table(columns, schema=_features_schema(features, placed=True)),
        table_rows=layout.places - 1,
        without_row=int((~frequent_I[at_I] & (rows.row_I == 0)).sum()),
        new_items=new,
        rows=rows.largest,
        rows_given=rows.given,
        rows_free=rows.free,
        evicted=rows.evicted,
    )


def build_beside(
    items: pa.Table,
    features: Sequence[FeatureRecord],
    settings: Items,
    kind: RawType,
    seed: int,
    known: pa.Table,
    ids: int,
    table_rows: int,
) -> Dictionary:
    """The dictionary of a data set whose items are those of another one: further items get ids above, and no row.

    Args:
        items: what `definition.with_former_items` says of every item, by key.
        features: those of items.
        settings: whether items are hashed; nobody is admitted or evicted.
        kind: of raw ids.
        seed: decides the shuffle of ids.
        known: `schemas.shards.ITEM_FEATURES` of the other data set: what its items are.
        ids: its largest id of an item.
        table_rows: the largest id or place in its item table.
    """
    items = items.combine_chunks()
    former_I, frequency_I = _column(items, "id"), items["frequency"].to_numpy().astype(np.int64)
    hashed, placed = settings.hash_buckets is not None, ITEM_PLACE in known.column_names
    if hashed:
        id_I, count, new = items["key"].to_numpy().astype(np.int32), ids, 0
        raw_I, of_known = pa.nulls(len(items), pa.string() if kind == "text" else pa.int64()), id_I[former_I > 0]
    else:
        id_I, new = _ids_after(items, ids, seed)
        count, raw_I, of_known = ids + new, items["key"], np.arange(ids + 1)
        check_count(count)
    columns = {each.name: by_id(each, items, id_I, count) for each in features}
    for name, column in columns.items():
        column[of_known] = known[name].to_numpy()[of_known]
    listed = [raw_I, id_I, frequency_I]
    if placed:
        columns[ITEM_PLACE] = np.concatenate([known[ITEM_PLACE].to_numpy(), np.zeros(new, np.int32)])
        listed += [items["last_seen"].to_numpy(), _column(items, "row"), _column(items, "row_day")]
        without = int((columns[ITEM_PLACE][1:] == 0).sum())
    else:
        without = count - table_rows
    return Dictionary(
        cumulative(frequency_I, id_I, count),
        pa.table(listed, schema=dictionary_schema(text=kind == "text", hashed=hashed, of_days=placed)),
        pa.table(columns, schema=_features_schema(features, placed=placed)),
        table_rows=table_rows,
        without_row=without,
        new_items=new,
    )


def _ids_after(items: pa.Table, ids: int, seed: int) -> tuple[NDArray[np.int32], int]:
    """Ids of items, those that have none yet above ``ids``; and how many these are."""
    id_I = _column(items, "id")
    new_I = id_I == 0
    new = int(new_I.sum())
    id_I[new_I] = ids + shuffled_ids(new, seed, _NEW)
    return id_I, new


def _column(items: pa.Table, name: str) -> NDArray[Any]:
    column: NDArray[Any] = items[name].to_numpy().astype(np.int32)
    return column


def _features_schema(features: Sequence[FeatureRecord], *, placed: bool) -> pa.Schema:
    fields = [pa.field(each.name, value_type(each), nullable=False) for each in features]
    return pa.schema([*fields, *([pa.field(ITEM_PLACE, pa.int32(), nullable=False)] if placed else [])])
