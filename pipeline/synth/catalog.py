"""Items and categories of generated data, and the compiled draws that choose among them and among past behaviours.

The item of rank r, from 1, has popularity ~ r^-item_zipf. Its category is drawn by hash, so that a category has items
of all ranks; a category's popularity is the sum of its items'. Raw ids, from 1, hide the ranks. Memory grows with the
number of items, never with the number of events.

A draw depends on its key alone, as in `pipeline.hashing`: generated data are the same however they are cut into runs.

C = categories, I = items in the order (category, rank), N = past behaviours.
"""

from math import gcd
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline.hashing import mix
from schemas.synth import SynthSettings

I64 = NDArray[np.int64]
F64 = NDArray[np.float64]


class Catalog(NamedTuple):
    """Categories 1 to C, and the items in the order (category, rank)."""

    cumulative_I: F64
    """Chance of each item or one before it, by popularity."""
    item_id_I: NDArray[np.int32]
    """Raw ids."""
    first_item_C1: I64
    """(C + 1,): where each category's items begin, and the end of the last one's."""
    popularity_C: F64
    """Chance of each category."""
    cumulative_C: F64
    """Chance of each category or one before it."""


def build_catalog(settings: SynthSettings) -> Catalog:
    """Make the catalogue that ``settings`` describe."""
    rank_I = np.arange(settings.items, dtype=np.int64)
    # Items by category, and within one by rank, because the sort is stable: a category is a range of items.
    category_I = _category_of_rank(rank_I, settings)
    rank_I = np.argsort(category_I, kind="stable")
    first_item_C1 = np.zeros(settings.categories + 1, np.int64)
    np.cumsum(np.bincount(category_I, minlength=settings.categories), out=first_item_C1[1:])
    cumulative_I = np.cumsum((rank_I + 1.0) ** -settings.item_zipf)
    cumulative_I /= cumulative_I[-1]
    cumulative_C = np.concatenate([np.zeros(1), cumulative_I])[first_item_C1][1:]
    # A stride that is coprime to the number of items permutes them: ids say nothing about popularity.
    item_id_I = (rank_I * _stride(settings.items) % settings.items + 1).astype(np.int32)
    return Catalog(cumulative_I, item_id_I, first_item_C1, np.diff(cumulative_C, prepend=0), cumulative_C)


def _category_of_rank(rank_I: I64, settings: SynthSettings) -> I64:
    """Category, from 0, by hash: category c has a share of the items ~ (c + 1)^-category_zipf."""
    cumulative_C = np.cumsum(np.arange(1, settings.categories + 1, dtype=np.float64) ** -settings.category_zipf)
    uniform_I = (mix(mix(rank_I, settings.seed), 64) >> np.uint64(11)) * 2.0**-53
    return np.searchsorted(cumulative_C / cumulative_C[-1], uniform_I, side="right")


def _stride(count: int) -> int:
    """A number coprime to ``count``: rank * stride % count then visits every id once, neighbours far apart.

    The golden section of ``count``, or the next number that is coprime.
    """
    stride = max(1, round(count * 0.6180339887))
    while gcd(stride, count) != 1:
        stride += 1
    return stride


@numba.njit(inline="always")
def uniform(key: np.uint64, counter: int, salt: int) -> float:
    """Draw a number in [0, 1), equal to ``(mix(key + counter, salt) >> 11) / 2**53``."""
    # `pipeline.hashing.mix` once more, for numba: an array for each single number would be too slow.
    z = key + np.uint64(counter) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(salt + 1)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.float64(z >> np.uint64(11)) * 2.0**-53


@numba.njit(inline="always")
def pick(cumulative_C: F64, u: float) -> int:
    """Find the index whose share of [0, 1) holds ``u``; the last entry of ``cumulative_C`` is 1."""
    return int(np.searchsorted(cumulative_C, u, side="right"))


@numba.njit(inline="always")
def draw_item(catalog: Catalog, category: int, u: float) -> int:
    """Draw an item of the category by popularity; returns its raw id."""
    first, last = catalog.first_item_C1[category - 1], catalog.first_item_C1[category] - 1
    # The item is drawn within the category's part of the cumulative chances: no array for each category is needed.
    before = catalog.cumulative_I[first - 1] if first > 0 else 0.0
    ticket = before + u * (catalog.cumulative_I[last] - before)
    # Not past the last one: the ticket may be rounded up.
    item_id: int = catalog.item_id_I[min(first + pick(catalog.cumulative_I[first : last + 1], ticket), last)]
    return item_id


@numba.njit(inline="always")
def draw_past(decay_N: F64, before: int, ticket: float) -> int:
    """Draw the index of a behaviour before ``before`` by weight; ``ticket`` is random, below the sum of the weights.

    The latest behaviour has weight 1; from behaviour n to n - 1 the weight falls by the factor ``decay_N[n]``.
    """
    past = before - 1
    weight = 1.0
    ticket -= weight
    while ticket >= 0 and past > 0:
        weight *= decay_N[past]
        past -= 1
        ticket -= weight
    return past
