"""Items and categories of generated data. Memory grows with items, never with events.

The item of rank r, from 1, has popularity ~ r^-item_zipf. Its category is drawn by hash, so that a category has items
of all ranks; a category's popularity is the sum of its items'. Raw ids, from 1, hide the ranks.

C = categories, I = items; ids of any shape.
"""

from math import gcd
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.ingest.hashing import mix
from schemas.synth import SynthSettings

I64 = NDArray[np.int64]
F64 = NDArray[np.float64]


class Catalog(NamedTuple):
    """Categories 1 to C, and the items in the order (category, rank)."""

    cumulative_I: F64
    """Chance of each item or one before it."""
    item_id_I: NDArray[np.int32]
    first_item_C1: I64
    """Where each category's items begin; one entry more, for the end."""
    popularity_C: F64
    """Chance of each category."""
    cumulative_C: F64
    """Chance of each category or one before it."""


def build_catalog(settings: SynthSettings) -> Catalog:
    """The catalogue that ``settings`` describe."""
    rank_I = np.arange(settings.items, dtype=np.int64)
    category_I = _category_of_rank(rank_I, settings)
    rank_I = np.argsort(category_I, kind="stable")
    first_item_C1 = np.zeros(settings.categories + 1, np.int64)
    np.cumsum(np.bincount(category_I, minlength=settings.categories), out=first_item_C1[1:])
    cumulative_I = np.cumsum((rank_I + 1.0) ** -settings.item_zipf)
    cumulative_I /= cumulative_I[-1]
    cumulative_C = np.concatenate([np.zeros(1), cumulative_I])[first_item_C1][1:]
    item_id_I = (rank_I * _stride(settings.items) % settings.items + 1).astype(np.int32)
    return Catalog(cumulative_I, item_id_I, first_item_C1, np.diff(cumulative_C, prepend=0), cumulative_C)


def category_of_item(item_id: NDArray[Any], settings: SynthSettings) -> I64:
    """Category of raw item ids.

    Raises:
        ValueError: an id that is no item's.
    """
    item_id = np.asarray(item_id, np.int64)
    if item_id.size and (item_id.min() < 1 or item_id.max() > settings.items):
        raise ValueError(f"item ids are 1 to {settings.items}; {item_id.min()} to {item_id.max()} are given")
    rank = (item_id - 1) * pow(_stride(settings.items), -1, settings.items) % settings.items
    return _category_of_rank(rank, settings) + 1


def _category_of_rank(rank: I64, settings: SynthSettings) -> I64:
    """Category, from 0, by hash: category c has a share of the items ~ (c + 1)^-category_zipf."""
    cumulative_C = np.cumsum(np.arange(1, settings.categories + 1, dtype=np.float64) ** -settings.category_zipf)
    uniform = (mix(mix(rank, settings.seed), 64) >> np.uint64(11)) * 2.0**-53
    return np.searchsorted(cumulative_C / cumulative_C[-1], uniform, side="right")


def _stride(count: int) -> int:
    """A number coprime to ``count``: rank * stride % count then visits every id once, neighbours far apart."""
    stride = max(1, round(count * 0.6180339887))
    while gcd(stride, count) != 1:
        stride += 1
    return stride
