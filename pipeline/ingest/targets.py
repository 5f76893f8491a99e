"""Which lines of a user become targets, and in which split.

L = lines, U = users, P = positives or impressions (the lines chosen), in line order.

Negatives: items in proportion to their frequency in the whole data, never one that the user touched.

P = positives, J = negatives of a positive, I = dense item ids.
"""

from typing import NamedTuple, assert_never

import numpy as np
from numpy.typing import NDArray

from pipeline.hashing import U64, mix
from pipeline.ingest.catalog import Catalog
from pipeline.ingest.lines import I64, Lines
from schemas.errors import UserError
from schemas.prepare import ImpressionSplit, PaperSplit, TimestampSplit
from schemas.shards import Split


class Chosen(NamedTuple):
    """Lines that are targets: their position and their split."""

    line_P: I64
    split_P: NDArray[np.int8]


def choose_targets(lines: Lines, split: PaperSplit | TimestampSplit | ImpressionSplit, seed: int) -> Chosen:
    """Apply the split's rule to every user of ``lines``, then drop users and targets with too little behind them."""
    match split:
        case PaperSplit():
            chosen = _paper(lines, split)
        case TimestampSplit():
            chosen = _by_timestamp(lines, split, seed)
        case ImpressionSplit():
            chosen = _impressions(lines)
        case _:
            assert_never(split)
    enough = (lines.behaviors_U >= split.min_behaviors)[lines.user_L[chosen.line_P]]
    enough &= lines.history_end_L[chosen.line_P] >= split.min_history
    return Chosen(chosen.line_P[enough], chosen.split_P[enough])


def _paper(lines: Lines, split: PaperSplit) -> Chosen:
    """Test T, validation T-1, train T-2-5j (1-based; paper, appendix on data)."""
    back_S = np.concatenate([[1, 2], 3 + split.train_stride * np.arange(split.train_targets)])
    code_S = np.full(len(back_S), Split.TRAIN, np.int8)
    code_S[:2] = Split.TEST, Split.VALIDATION
    count_U = lines.behaviors_U
    line_US = (lines.user_start_U + count_U)[:, None] - back_S
    exists_US = count_U[:, None] >= back_S
    line_P = line_US[exists_US]
    split_P = np.broadcast_to(code_S, line_US.shape)[exists_US]
    order = np.argsort(line_P)
    return Chosen(line_P[order], split_P[order])


def _by_timestamp(lines: Lines, split: TimestampSplit, seed: int) -> Chosen:
    """A few lines of each of a user's last timestamps (groups), with distinct items, drawn by hash."""
    start_G = np.flatnonzero(lines.group_start_L == np.arange(len(lines)))
    user_G = lines.user_L[start_G]
    last_group_U = np.searchsorted(start_G, np.append(lines.user_start_U, len(lines))[1:]) - 1
    from_end_G = last_group_U[user_G] - np.arange(len(start_G))
    split_G = np.full(len(start_G), Split.TRAIN, np.int8)
    split_G[from_end_G < split.test_groups + split.validation_groups] = Split.VALIDATION
    split_G[from_end_G < split.test_groups] = Split.TEST

    group_L = np.cumsum(lines.group_start_L == np.arange(len(lines))) - 1
    # Only groups with enough behind them compete, which also keeps the sort small.
    line_C = np.flatnonzero(lines.history_end_L >= split.min_history)
    group_C = group_L[line_C]
    key_C = mix(lines.user_id_L[line_C], seed) ^ mix(lines.timestamp_L[line_C], 2)
    key_C = mix(key_C ^ mix(lines.item_L[line_C], 3), 4)
    order = np.lexsort((line_C, lines.item_L[line_C], key_C, group_C))
    line_C, group_C = line_C[order], group_C[order]
    item_C = lines.item_L[line_C]
    distinct = np.ones(len(line_C), bool)
    distinct[1:] = (group_C[1:] != group_C[:-1]) | (item_C[1:] != item_C[:-1])
    line_C, group_C = line_C[distinct], group_C[distinct]
    first_C = np.searchsorted(group_C, group_C)
    taken = np.arange(len(line_C)) - first_C < split.targets_per_group
    line_P = np.sort(line_C[taken])
    return Chosen(line_P, split_G[group_L[line_P]])


def _impressions(lines: Lines) -> Chosen:
    assert lines.split_L is not None, "impressions carry their split"
    line_P = np.flatnonzero(~lines.is_event_L)
    return Chosen(line_P, lines.split_L[line_P])


_ATTEMPTS = 32


def draw_negatives(lines: Lines, line_P: I64, catalog: Catalog, per_positive: int, seed: int) -> NDArray[np.int32]:
    """Dense ids of negatives, (P, J). A draw depends on (seed, user id, position among the user's lines, j) alone.

    Raises:
        UserError: a user has touched every item there is.
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
        raise UserError(
            f"user {lines.user_id_L[lines.user_start_U[user]]} touched every item there is: no negative can be drawn; "
            "set split.negatives=0 or give more data"
        )
    return int(_draw(random, cumulative_I)[0])
