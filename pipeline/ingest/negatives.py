"""Negatives: items in proportion to their frequency in the whole data, never one that the user touched.

P = positives, J = negatives of a positive, I = dense item ids.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.ingest.catalog import Catalog
from pipeline.ingest.hashing import U64, mix
from pipeline.ingest.lines import I64, Lines

_ATTEMPTS = 32


def draw_negatives(lines: Lines, line_P: I64, catalog: Catalog, per_positive: int, seed: int) -> NDArray[np.int32]:
    """Dense ids of negatives, (P, J). A draw depends on (seed, user id, position among the user's lines, j) alone.

    Raises:
        ValueError: a user has touched every item there is.
    """
    size = len(catalog.cumulative_I)
    touched = _touched(lines, size)
    user_P = lines.user_L[line_P]
    position_P = line_P - lines.user_start_U[user_P]
    key_P = mix(mix(lines.user_id_L[line_P], seed) ^ position_P.astype(np.uint64), 5)
    key = np.repeat(key_P, per_positive) + np.tile(np.arange(per_positive, dtype=np.uint64), len(line_P))
    user = np.repeat(user_P, per_positive)
    item = np.zeros(len(key), np.int32)
    pending = np.arange(len(key))
    for attempt in range(_ATTEMPTS):
        drawn = _draw(mix(key[pending], 6 + attempt), catalog.cumulative_I)
        refused = _contains(touched, user[pending] * size + drawn)
        item[pending] = drawn
        pending = pending[refused]
        if not len(pending):
            break
    for draw in pending:
        # A user who has touched nearly all there is: draw from what is left, which is what rejection converges to.
        item[draw] = _draw_from_rest(lines, int(user[draw]), mix(key[draw : draw + 1], 6 + _ATTEMPTS), catalog)
    return item.reshape(len(line_P), per_positive)


def _touched(lines: Lines, size: int) -> I64:
    """user * size + item of everything each user touched, sorted."""
    return np.unique(lines.user_L * size + lines.item_L)


def _contains(sorted_keys: I64, keys: I64) -> NDArray[np.bool_]:
    position = np.searchsorted(sorted_keys, keys)
    return sorted_keys[np.minimum(position, len(sorted_keys) - 1)] == keys


def _draw(random: U64, cumulative_I: I64) -> I64:
    ticket = (random % np.uint64(cumulative_I[-1])).astype(np.int64)
    return np.searchsorted(cumulative_I, ticket, side="right")


def _draw_from_rest(lines: Lines, user: int, random: U64, catalog: Catalog) -> int:
    frequency_I = np.diff(catalog.cumulative_I, prepend=0)
    frequency_I[np.unique(lines.item_L[lines.user_L == user])] = 0
    cumulative_I = np.cumsum(frequency_I)
    if not cumulative_I[-1]:
        raise ValueError(
            f"user {lines.user_id_L[lines.user_start_U[user]]} touched every item there is: no negative can be drawn; "
            "set split.negatives=0 or give more data"
        )
    return int(_draw(random, cumulative_I)[0])
