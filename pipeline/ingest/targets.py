"""Targets of users: which lines become positives (or are impressions), in which split, and which negatives they get.

A split is a rule that looks at one user's lines alone. Negatives are items in proportion to their frequency in the
whole data, never one that the user touched.

L = lines, U = users, P = positives or impressions (the lines chosen), in line order, J = negatives of a positive,
I = dense item ids; inside a function also S = places of the paper's split, or the splits, G = a user's groups of equal
timestamps or of one period, C = candidate lines, R = runs of lines of a user, a time and an item.
"""

from typing import NamedTuple, assert_never

import numpy as np
from numpy.typing import NDArray

from pipeline.hashing import NOTHING_LEFT, draw_unowned, mix
from pipeline.ingest.definition import EVENT
from pipeline.ingest.dictionaries import Dictionary
from pipeline.ingest.lines import I64, Lines
from pipeline.ingest.reading import Tally
from schemas.errors import UserError
from schemas.prepare import DateSplit, ImpressionSplit, PaperSplit, SplitSettings, TimestampSplit
from schemas.shards import UNLABELED, Split


class ChosenLines(NamedTuple):
    """Lines that are targets, in line order, and the split of each."""

    line_P: I64
    split_P: NDArray[np.int8]


def choose_targets(lines: Lines, split: SplitSettings, seed: int, *, day: int = 0) -> ChosenLines:
    """Apply the split's rule to every user of ``lines``, then drop users and targets with too little behind them.

    Args:
        lines: of whole users.
        split: the rule.
        seed: decides draws.
        day: number of the day in its chain. Targets of a day after the first one are its own lines alone, and all of
            them are for training: what later days bring tests what was learnt from it.
    """
    chosen = _chosen(lines, split, seed) if day == 0 else _of_day(lines, split, seed)
    enough = (lines.behaviors_U >= split.min_behaviors)[lines.user_L[chosen.line_P]]
    enough &= lines.history_end_L[chosen.line_P] >= split.min_history
    return ChosenLines(chosen.line_P[enough], chosen.split_P[enough])


def _chosen(lines: Lines, split: SplitSettings, seed: int) -> ChosenLines:
    if lines.split_L is not None:
        # With impressions, these are the targets, whatever divided them.
        line_P = np.flatnonzero(~lines.is_event_L)
        return ChosenLines(line_P, lines.split_L[line_P])
    match split:
        case PaperSplit():
            return _paper(lines, split)
        case TimestampSplit():
            return _by_timestamp(lines, split, seed)
        case DateSplit():
            return _by_date(lines, split)
        case ImpressionSplit():
            raise AssertionError("impressions carry their split")
        case _:
            assert_never(split)


def _of_day(lines: Lines, split: SplitSettings, seed: int) -> ChosenLines:
    """Choose among the lines of a day that follows others, without validation and test."""
    if lines.split_L is not None:
        line_P = np.flatnonzero(~lines.is_event_L)
        # Without labels there is nothing to train on: such impressions stay where they are, in the test.
        unlabeled_P = _label(lines)[line_P] == UNLABELED
        return ChosenLines(line_P, np.where(unlabeled_P, lines.split_L[line_P], Split.TRAIN).astype(np.int8))
    match split:
        case TimestampSplit():
            line_P, _ = _by_timestamp(lines, split, seed)
        case PaperSplit() | DateSplit():
            back_L = _end_of_user_L(lines) - 1 - np.arange(len(lines))
            chosen_L = (back_L % split.train_stride == 0) & (back_L // split.train_stride < split.train_targets)
            line_P = np.flatnonzero(chosen_L & lines.is_own_L)
        case ImpressionSplit():
            raise AssertionError("impressions carry their split")
        case _:
            assert_never(split)
    return ChosenLines(line_P, np.full(len(line_P), Split.TRAIN, np.int8))


def _label(lines: Lines) -> NDArray[np.int8]:
    return np.full(len(lines), EVENT, np.int8) if lines.label_L is None else lines.label_L


def _end_of_user_L(lines: Lines) -> I64:
    """One more than the last line of each line's user."""
    return np.append(lines.user_start_U[1:], len(lines))[lines.user_L]


def count_left_out(lines: Lines, chosen: ChosenLines, min_behaviors: int, min_history: int) -> Tally:
    """What became of the users, behaviours and impressions of ``lines``, by reason; of several the first one counts.

    Args:
        lines: of whole users.
        chosen: what `choose_targets` returned for them.
        min_behaviors: of the split.
        min_history: of the split.

    Returns:
        ``users``, ``users: REASON``, ``events: REASON`` and ``impressions: REASON`` (those that are left out), and of
        all lines ``events repeated``, ``impressions repeated`` and ``impressions contradictory``. Carried lines were
        counted on their own day.
    """
    kept_U = np.zeros(len(lines.behaviors_U), bool)
    kept_U[lines.user_L[chosen.line_P]] = True
    reasons_U = {
        "no_events": lines.behaviors_U == 0,
        "below_min_behaviors": lines.behaviors_U < min_behaviors,
        "no_target": ~kept_U,
    }
    shown_L = ~lines.is_event_L
    counts = Tally({"users": len(kept_U)})
    left_L = shown_L.copy()
    left_L[chosen.line_P] = False
    open_U = ~kept_U
    for reason, applies_U in reasons_U.items():
        of_reason_U = open_U & applies_U
        open_U &= ~of_reason_U
        counts[f"users: {reason}"] = int(of_reason_U.sum())
        counts[f"events: {reason}"] = int(lines.own_behaviors_U[of_reason_U].sum())
        if reason != "no_target":
            here_L = left_L & of_reason_U[lines.user_L]
            counts[f"impressions: {reason}"] = int(here_L.sum())
            left_L &= ~here_L
    assert not np.any(lines.history_end_L[left_L] >= min_history), "an impression is left out for a reason"
    counts["impressions: below_min_history"] = int(left_L.sum())
    counts.update(_count_repeated(lines))
    return +counts


def _count_repeated(lines: Lines) -> Tally:
    """How many lines say what one before has said: the same user, item and time, and label for impressions."""
    # Lines of a user, a time and an item stand together, behaviours and impressions apart from each other.
    same_L = np.zeros(len(lines), bool)
    same_L[1:] = (lines.group_start_L[1:] == lines.group_start_L[:-1]) & (lines.item_L[1:] == lines.item_L[:-1])
    start_R = np.flatnonzero(~same_L)
    if not len(start_R):
        return Tally()
    if lines.label_L is None:
        count_R = np.add.reduceat(lines.is_own_L.astype(np.int64), start_R)
        return Tally({"events repeated": int(np.maximum(count_R - 1, 0).sum())})
    by_label = {
        label: np.add.reduceat((lines.is_own_L & (lines.label_L == label)).astype(np.int64), start_R)
        for label in (EVENT, UNLABELED, 0, 1)
    }
    more = {label: int(np.maximum(count_R - 1, 0).sum()) for label, count_R in by_label.items()}
    contradictory = int(((by_label[0] > 0) & (by_label[1] > 0)).sum())
    shown = more[UNLABELED] + more[0] + more[1]
    return Tally(
        {"events repeated": more[EVENT], "impressions repeated": shown, "impressions contradictory": contradictory}
    )


def _paper(lines: Lines, split: PaperSplit) -> ChosenLines:
    """Number T of T behaviours is for test, T-1 for validation and T-2-5j for training (paper, appendix on data)."""
    # How far before the end of the user's lines each target is: 1 is the last one.
    back_S = np.concatenate([[1, 2], 3 + split.train_stride * np.arange(split.train_targets)])
    code_S = np.full(len(back_S), Split.TRAIN, np.int8)
    code_S[:2] = Split.TEST, Split.VALIDATION
    # With this split there are no impressions: a user's lines are the behaviours, and the last line is number T.
    count_U = lines.behaviors_U
    line_US = (lines.user_start_U + count_U)[:, None] - back_S
    exists_US = count_U[:, None] >= back_S
    line_P = line_US[exists_US]
    split_P = np.broadcast_to(code_S, line_US.shape)[exists_US]
    order = np.argsort(line_P)
    return ChosenLines(line_P[order], split_P[order])


def _by_timestamp(lines: Lines, split: TimestampSplit, seed: int) -> ChosenLines:
    """A few lines of each of a user's last timestamps (groups), with distinct items, drawn by hash."""
    # How far from the user's end each group is decides its split.
    start_G = np.flatnonzero(lines.group_start_L == np.arange(len(lines)))
    user_G = lines.user_L[start_G]
    last_group_U = np.searchsorted(start_G, np.append(lines.user_start_U, len(lines))[1:]) - 1
    from_end_G = last_group_U[user_G] - np.arange(len(start_G))
    split_G = np.full(len(start_G), Split.TRAIN, np.int8)
    split_G[from_end_G < split.test_groups + split.validation_groups] = Split.VALIDATION
    split_G[from_end_G < split.test_groups] = Split.TEST

    group_L = np.cumsum(lines.group_start_L == np.arange(len(lines))) - 1
    # Only groups with enough behind them compete, which also keeps the sort small.
    line_C = np.flatnonzero((lines.history_end_L >= split.min_history) & lines.is_own_L)
    group_C = group_L[line_C]
    # Keys of what a line says, never of where it stands: the choice must not depend on how lines came in.
    key_C = mix(lines.user_number_U[lines.user_L[line_C]], seed) ^ mix(lines.timestamp_L[line_C], 2)
    key_C = mix(key_C ^ mix(lines.item_L[line_C], 3), 4)
    # `lexsort` takes the main key last. Lines of one item in a group have one key and lie together; the first stands
    # for all.
    order = np.lexsort((line_C, lines.item_L[line_C], key_C, group_C))
    line_C, group_C = line_C[order], group_C[order]
    item_C = lines.item_L[line_C]
    distinct = np.ones(len(line_C), bool)
    distinct[1:] = (group_C[1:] != group_C[:-1]) | (item_C[1:] != item_C[:-1])
    line_C, group_C = line_C[distinct], group_C[distinct]
    # Of each group, in the order of the keys, the first few.
    first_C = np.searchsorted(group_C, group_C)
    chosen = np.arange(len(line_C)) - first_C < split.targets_per_group
    line_P = np.sort(line_C[chosen])
    return ChosenLines(line_P, split_G[group_L[line_P]])


def _by_date(lines: Lines, split: DateSplit) -> ChosenLines:
    """A user's last behaviours of each period; of that for training every ``train_stride``-th, counted back."""
    code_L = (lines.timestamp_L >= split.validation_from).astype(np.int64) + (lines.timestamp_L >= split.test_from)
    # Lines of a user are in time order, so those of a period stand together.
    period_L = lines.user_L * len(Split) + code_L
    start_G = np.flatnonzero(np.diff(period_L, prepend=-1))
    end_G = np.append(start_G[1:], len(lines))
    back_L = np.repeat(end_G, end_G - start_G) - 1 - np.arange(len(lines))
    stride_S = np.array([split.train_stride, 1, 1])
    targets_S = np.array([split.train_targets, split.validation_targets, split.test_targets])
    chosen_L = (back_L % stride_S[code_L] == 0) & (back_L // stride_S[code_L] < targets_S[code_L])
    line_P = np.flatnonzero(chosen_L)
    return ChosenLines(line_P, code_L[line_P].astype(np.int8))


def draw_negatives(
    lines: Lines, line_P: I64, dictionary: Dictionary, per_positive: int, seed: int
) -> NDArray[np.int32]:
    """Draw the negatives of each positive. A draw depends on (seed, user, number among the user's lines, j) alone.

    Args:
        lines: of whole users.
        line_P: the positives.
        dictionary: says how frequent each item is.
        per_positive: J.
        seed: decides the draws.

    Returns:
        (P, J), dense item ids.

    Raises:
        UserError: a user has touched every item there is.
    """
    size = len(dictionary.cumulative_I)
    touched = _touched(lines, size)
    user_P = lines.user_L[line_P]
    position_P = line_P - lines.user_start_U[user_P]
    # The number among the user's own lines, not in this part of the stream: how lines were cut must not matter.
    key_P = mix(mix(lines.user_number_U[user_P], seed) ^ position_P.astype(np.uint64), 5)
    key = np.repeat(key_P, per_positive) + np.tile(np.arange(per_positive, dtype=np.uint64), len(line_P))
    user = np.repeat(user_P, per_positive)
    item = draw_unowned(key, user, touched, dictionary.cumulative_I, 6)
    if (item == NOTHING_LEFT).any():
        first = lines.user_start_U[user[np.argmax(item == NOTHING_LEFT)]]
        raise UserError(
            f"user {lines.user_id_L[first]} touched every item there is: no negative can be drawn; "
            "set split.negatives=0 or give more data"
        )
    return item.reshape(len(line_P), per_positive).astype(np.int32)


def _touched(lines: Lines, size: int) -> I64:
    """Everything that each user touched, sorted: int64, ``user * size + item``."""
    # Not `np.unique`, which hashes first and takes several times as long: what is there twice does no harm.
    return np.sort(lines.user_L * size + lines.item_L)
