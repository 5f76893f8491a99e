"""Compiled random numbers that depend on their key alone, as ``pipeline.ingest.hashing``, and draws made of them.

C = categories, N = past behaviours.
"""

import numba
import numpy as np

from pipeline.synth.catalog import F64, Catalog


@numba.njit(inline="always")
def uniform(key: np.uint64, counter: int, salt: int) -> float:
    """A number in [0, 1), equal to ``(mix(key + counter, salt) >> 11) / 2**53``."""
    z = key + np.uint64(counter) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(salt + 1)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.float64(z >> np.uint64(11)) * 2.0**-53


@numba.njit(inline="always")
def pick(cumulative_C: F64, u: float) -> int:
    """Index whose share of [0, 1) holds ``u``; the last one of ``cumulative_C`` is 1."""
    return int(np.searchsorted(cumulative_C, u, side="right"))


@numba.njit(inline="always")
def draw_item(catalog: Catalog, category: int, u: float) -> int:
    """Raw id of an item of the category, by popularity."""
    first, last = catalog.first_item_C1[category - 1], catalog.first_item_C1[category] - 1
    before = catalog.cumulative_I[first - 1] if first > 0 else 0.0
    ticket = before + u * (catalog.cumulative_I[last] - before)
    # Not past the last one: the ticket may be rounded up.
    return catalog.item_id_I[min(first + pick(catalog.cumulative_I[first : last + 1], ticket), last)]


@numba.njit(inline="always")
def draw_past(decay_N: F64, before: int, ticket: float) -> int:
    """A behaviour before ``before``, drawn by weight: 1 for the latest, and falling by ``decay_N[n]`` from n to n - 1.

    ``ticket`` is a random number below the sum of the weights.
    """
    past = before - 1
    weight = 1.0
    ticket -= weight
    while ticket >= 0 and past > 0:
        weight *= decay_N[past]
        past -= 1
        ticket -= weight
    return past
