"""Targets of a day that follows others, against a rule in plain Python for each kind of split."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ingest.definition import EVENT
from pipeline.ingest.lines import Lines
from pipeline.ingest.targets import choose_targets, count_left_out
from schemas.prepare import DateSplit, ImpressionSplit, PaperSplit, SplitSettings, TimestampSplit
from schemas.shards import UNLABELED, Split


class Line(NamedTuple):
    user: int
    time: int
    item: int
    label: int
    carried: int


def lines_of(rows: list[Line], *, shown: bool) -> Lines:
    def column(name: str, kind: type) -> np.ndarray:
        return np.array([getattr(row, name) for row in rows], kind)

    label = column("label", np.int8)
    return Lines(
        shard_L=np.zeros(len(rows), np.int32),
        user_id_L=pa.array([row.user for row in rows], pa.int64()),
        timestamp_L=column("time", np.int64),
        item_L=column("item", np.int32),
        label_L=label if shown else None,
        # As a column of the impressions may say, which a later day's do not heed.
        split_L=np.where(label == EVENT, -1, Split.TEST).astype(np.int8) if shown else None,
        line_L=np.arange(len(rows)) if shown else None,
        carried_L=column("carried", np.int8),
    )


@st.composite
def days(draw: st.DrawFn, *, shown: bool) -> list[Line]:
    """Lines of users, carried ones before time 10 and the day's own after it, in the order of the engine."""
    rows = []
    labels = st.sampled_from([EVENT, EVENT, 0, 1]) if shown else st.just(EVENT)
    for user in range(draw(st.integers(1, 4))):
        before, own = (draw(st.lists(st.integers(*of), max_size=8)) for of in ((0, 9), (10, 16)))
        rows += [Line(user, time, draw(st.integers(1, 4)), EVENT, 1) for time in before]
        rows += [Line(user, time, draw(st.integers(1, 4)), draw(labels), 0) for time in [*own, 16]]
    return sorted(rows)


def expected(rows: list[Line], split: SplitSettings, rule: Callable[[list[int]], list[int]]) -> list[int]:
    """Indices of the lines that ``rule`` chooses of each user's own ones, if there is enough before them."""
    found = []
    for user in {row.user for row in rows}:
        mine = [index for index, row in enumerate(rows) if row.user == user]
        behaviors = [rows[index].time for index in mine if rows[index].label == EVENT]
        for index in rule([index for index in mine if not rows[index].carried]):
            before = sum(time < rows[index].time for time in behaviors)
            if before >= split.min_history and len(behaviors) >= split.min_behaviors:
                found.append(index)
    return sorted(found)


least = st.integers(1, 5)
quick = settings(deadline=None)


@quick
@given(rows=days(shown=False), stride=st.integers(1, 3), number=st.integers(0, 4), history=least, behaviors=least)
def test_the_last_behaviors(rows: list[Line], stride: int, number: int, history: int, behaviors: int) -> None:
    more = {"train_stride": stride, "train_targets": number, "min_history": history, "min_behaviors": behaviors}
    by_date = {"validation_from": 12, "test_from": 14}
    for split in (PaperSplit(**more), DateSplit.model_validate(more | by_date)):
        line_P, split_P = choose_targets(lines_of(rows, shown=False), split, 0, day=1)
        assert line_P.tolist() == expected(rows, split, lambda own: own[::-1][::stride][:number])
        assert (split_P == Split.TRAIN).all()


@quick
@given(rows=days(shown=False), number=st.integers(1, 3), history=least)
def test_baskets(rows: list[Line], number: int, history: int) -> None:
    split = TimestampSplit(targets_per_group=number, min_history=history, test_groups=1, validation_groups=1)
    line_P, split_P = choose_targets(lines_of(rows, shown=False), split, 0, day=1)
    # Which items of a basket are drawn is a matter of hashes; how many, and that they differ, is not.
    allowed = set(expected(rows, split, list))
    assert set(line_P.tolist()) <= allowed
    assert (split_P == Split.TRAIN).all()
    baskets = {(rows[index].user, rows[index].time) for index in allowed}
    for user, time in baskets:
        items = {rows[index].item for index in allowed if rows[index][:2] == (user, time)}
        drawn = [rows[index].item for index in line_P.tolist() if rows[index][:2] == (user, time)]
        assert len(drawn) == len(set(drawn)) == min(number, len(items))


@quick
@given(rows=days(shown=True), history=st.integers(0, 4))
def test_impressions(rows: list[Line], history: int) -> None:
    split = ImpressionSplit(min_history=history)
    lines = lines_of(rows, shown=True)
    line_P, split_P = choose_targets(lines, split, 0, day=1)
    assert line_P.tolist() == expected(rows, split, lambda own: [index for index in own if rows[index].label != EVENT])
    assert (split_P == Split.TRAIN).all()
    counted = count_left_out(lines, choose_targets(lines, split, 0, day=1), split.min_behaviors, history)
    own = [row for row in rows if not row.carried]
    shown = [row for row in own if row.label != EVENT]
    left = sum(counted[f"impressions: {name}"] for name in ("no_events", "below_min_behaviors", "below_min_history"))
    assert left == len(shown) - len(line_P)
    chosen = {rows[index].user for index in line_P}
    assert counted["users"] == len({row.user for row in rows})
    left = sum(counted[f"events: {name}"] for name in ("no_events", "below_min_behaviors", "no_target"))
    assert left == sum(row.label == EVENT and row.user not in chosen for row in own), "of the day alone"
    events = [row[:3] for row in own if row.label == EVENT]
    assert counted["events repeated"] == len(events) - len(set(events))


@quick
@given(rows=days(shown=True))
def test_what_has_no_label_is_there_to_be_scored(rows: list[Line]) -> None:
    rows = sorted(row if row.label == EVENT else row._replace(label=UNLABELED) for row in rows)
    _, split_P = choose_targets(lines_of(rows, shown=True), ImpressionSplit(min_history=0), 0, day=1)
    assert (split_P == Split.TEST).all()
