"""Which items own a row of the item table, day by day of a chain: rows are given, lost and given again.

I = items, in the order of their ids.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from schemas.prepare import Eviction

_DAY = 86_400
"""Seconds."""


class ItemRows(NamedTuple):
    """Rows of items after a day."""

    row_I: NDArray[np.int32]
    """0: the item has none."""
    day_I: NDArray[np.int32]
    """The day on which the item got its row."""
    largest: int
    """The largest row that an item has had."""
    evicted: int = 0
    """Items that have lost theirs on this day."""
    given: int = 0
    """Items that have got one on this day."""

    @property
    def free(self) -> int:
        """Rows that no item has."""
        return self.largest - int(np.count_nonzero(self.row_I))


def assign_rows(
    before: ItemRows,
    *,
    wanted_I: NDArray[np.bool_],
    frequency_I: NDArray[np.int64],
    last_seen_I: NDArray[np.int64],
    now: int,
    day: int,
    eviction: Eviction,
) -> ItemRows:
    """Evict items, then give rows to those that want one: freed rows first, the lowest first, in the order of ids.

    Args:
        before: rows after the day before; 0 for items that are new.
        wanted_I: items that have none and are to get one: this day has them, and they are frequent enough.
        frequency_I: of all days.
        last_seen_I: time of the last event or impression.
        now: the last moment of the day.
        day: its number in the chain; on day 0 ``unseen_days`` means nothing, since all of it is there to be learnt.
        eviction: which items lose theirs.
    """
    row_I, day_I = before.row_I.copy(), before.day_I.copy()
    has_I = row_I > 0
    keeps_I = has_I.copy()
    gets_I = wanted_I & ~has_I
    if eviction.unseen_days is not None and day > 0:
        recent_I = last_seen_I > now - eviction.unseen_days * _DAY
        keeps_I &= recent_I
        # A row that the next day would take away again is not given: data sets may be longer than a day.
        gets_I &= recent_I
    if eviction.rows is not None and np.count_nonzero(keeps_I | gets_I) > eviction.rows:
        candidate = np.flatnonzero(keeps_I | gets_I)
        first, second = last_seen_I[candidate], frequency_I[candidate]
        if eviction.by == "frequency":
            first, second = second, first
        # Of equal ones those with smaller ids, which have been there longer.
        best = candidate[np.lexsort((candidate, -second, -first))[: eviction.rows]]
        stays_I = np.zeros(len(row_I), bool)
        stays_I[best] = True
        keeps_I &= stays_I
        gets_I &= stays_I
    evicted_I = has_I & ~keeps_I
    row_I[evicted_I] = 0
    day_I[evicted_I] = 0
    getting = np.flatnonzero(gets_I)
    free = _free(row_I, before.largest, len(getting))
    new = before.largest + 1 + np.arange(len(getting) - len(free))
    row_I[getting] = np.concatenate([free, new])
    day_I[getting] = day
    return ItemRows(row_I, day_I, before.largest + len(new), int(np.count_nonzero(evicted_I)), len(getting))


def _free(row_I: NDArray[np.int32], largest: int, most: int) -> NDArray[np.int64]:
    """The lowest rows that nobody owns, at most so many."""
    owned = np.zeros(largest + 1, bool)
    owned[row_I] = True
    owned[0] = True
    return np.flatnonzero(~owned)[:most]
