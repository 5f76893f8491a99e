"""Which lines of a user become targets, and in which split.

L = lines, U = users, P = positives or impressions (the lines chosen), in line order.
"""

from typing import NamedTuple, assert_never

import numpy as np
from numpy.typing import NDArray

from pipeline.ingest.hashing import mix
from pipeline.ingest.lines import I64, Lines
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
