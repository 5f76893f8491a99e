"""Negatives of training that are drawn anew in each epoch."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from embeddings.batch import Batch
from pipeline.ingest.prepare import prepare
from pipeline.stream.data_set import DataSet
from pipeline.stream.history_stream import HistoryStream
from schemas.errors import UserError
from schemas.prepare import PrepareSettings
from schemas.shards import SPLITS, Split
from schemas.stream import StreamSettings
from tests.data.test_stream import assert_equal
from tests.datasets import Target, User, write_dataset

ITEMS, USERS, EACH = 40, 50, 3


def prepared(folder: Path, users: int = USERS, **split: Any) -> Path:
    """Targets that are cut from events, with two negatives each."""
    rng = np.random.default_rng(0)
    lines = ["user_id,item_id,category_id,timestamp"]
    for user in range(users):
        items = rng.zipf(1.3, 30) % ITEMS
        lines += [f"{user},{item},{item % 5},{100 * time}" for time, item in enumerate(items)]
    folder.mkdir()
    (folder / "events.csv").write_text("\n".join(lines) + "\n")
    content = {
        "events": {"files": [str(folder / "events.csv")]},
        "split": {"kind": "paper", "min_behaviors": 5, "train_stride": 2, "train_targets": 6, "negatives": 2, **split},
        "shards": {"behaviors_per_shard": 300, "users_per_row_group": 4},
    }
    prepare(PrepareSettings.model_validate(content), folder / "data")
    return folder / "data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("negatives") / "log")


def opened(folder: Path, per_positive: int | None = EACH, draw: str = "frequency", **arguments: Any) -> HistoryStream:
    chosen = {"batch_size": 16, "history_length": 10, "shuffle_memory": 20_000} | arguments.pop("settings", {})
    negatives = None if per_positive is None else {"per_positive": per_positive, "draw": draw}
    settings = StreamSettings(**chosen, negatives=negatives)
    return HistoryStream(folder, **{"split": "train", "settings": settings, "seed": 3, "shuffle": True} | arguments)


def read(folder: Path, *arguments: Any, epoch: int = 0, **more: Any) -> list[Batch]:
    with opened(folder, *arguments, **more) as stream:
        stream.set_epoch(epoch)
        batches = list(stream)
        assert len(batches) == stream.steps_per_epoch
        return batches


def targets(batches: list[Batch]) -> Counter[tuple[int, ...]]:
    """(user, timestamp, item, category, label, behaviours before it that are seen) of each target."""
    return Counter(
        (user, int(when), int(item), int(category), int(label), int(seen))
        for batch in batches
        for user, when, item, category, label, seen in zip(
            batch.user_id_U[batch.user_T].tolist(),
            batch.timestamp_T,
            batch.item_T,
            batch.features_T["category"],
            batch.label_T,
            batch.histories["history"].end_T - batch.histories["history"].start_T,
            strict=True,
        )
    )


def owned(folder: Path) -> dict[int, set[int]]:
    """Items of each user's whole history."""
    data_set = DataSet.open(folder)
    tables = [pq.read_table(folder / shard.path).to_pylist() for shard in data_set.manifest.shards]
    return {row["user_id"]: set(row["history_item"]) for rows in tables for row in rows}


@pytest.mark.parametrize("draw", ["frequency", "uniform"])
@pytest.mark.parametrize("each", [1, EACH])
def test_positives_stay_and_each_has_so_many_negatives(folder: Path, each: int, draw: str) -> None:
    stored, drawn = targets(read(folder, None)), targets(read(folder, each, draw))
    positives = {target: count for target, count in stored.items() if target[4]}
    assert {target: count for target, count in drawn.items() if target[4]} == positives
    assert sum(drawn.values()) == (1 + each) * sum(positives.values())
    # As many for each one, with its moment and history.
    moments = Counter(target[:2] + target[5:] for target in drawn.elements() if not target[4])
    assert moments == Counter({target[:2] + target[5:]: each * count for target, count in positives.items()})
    items = owned(folder)
    assert all(target[2] not in items[target[0]] for target in drawn if not target[4])
    category = {target[2]: target[3] for target in stored}
    raw = DataSet.open(folder).names("item")
    names = DataSet.open(folder).names("category")
    assert all(names[target[3]].as_py() == raw[target[2]].as_py() % 5 for target in drawn), category


def test_each_epoch_and_seed_has_its_own(folder: Path) -> None:
    epochs = [targets(read(folder, epoch=epoch)) for epoch in (0, 1, 2)]
    assert targets(read(folder)) == epochs[0]
    negatives = [{target for target in epoch if not target[4]} for epoch in (*epochs, targets(read(folder, seed=4)))]
    for place, one in enumerate(negatives):
        for other in negatives[:place]:
            assert len(one & other) < 0.8 * len(one)


@pytest.mark.parametrize("draw", ["frequency", "uniform"])
def test_they_depend_on_neither_ranks_nor_batches_nor_order(folder: Path, draw: str) -> None:
    expected = targets(read(folder, EACH, draw, epoch=1))
    for world in (2, 3):
        ranks = [read(folder, EACH, draw, epoch=1, rank=rank, world=world) for rank in range(world)]
        assert len({len(batches) for batches in ranks}) == 1
        assert targets([batch for batches in ranks for batch in batches]) == expected
    for settings in ({"batch_size": 7}, {"shuffle_memory": 0}, {"targets_per_user_per_batch": 1}, {"threads": 1}):
        assert targets(read(folder, EACH, draw, epoch=1, settings=settings)) == expected
    assert targets(read(folder, EACH, draw, epoch=1, shuffle=False)) == expected


def test_going_on_within_an_epoch(folder: Path) -> None:
    with opened(folder, rank=1, world=2) as stream:
        stream.set_epoch(2)
        states, batches = [], []
        for batch in stream:
            states.append(stream.state_dict())
            batches.append(batch)
    for done, state in enumerate(states[:-1], 1):
        with opened(folder, rank=1, world=2) as stream:
            stream.load_state_dict(state)
            for batch, expected in zip(stream, batches[done:], strict=True):
                assert_equal(batch, expected)
    for other in (None, EACH + 1):
        with (
            opened(folder, other, rank=1, world=2) as stream,
            pytest.raises(UserError, match="cannot go on: negatives"),
        ):
            stream.load_state_dict(states[0])
        with opened(folder, other, rank=1, world=2) as stream:
            state = stream.state_dict()
        with opened(folder, rank=1, world=2) as stream, pytest.raises(UserError, match="cannot go on: negatives"):
            stream.load_state_dict(state)


def test_going_on_within_an_epoch_on_other_ranks(folder: Path) -> None:
    """Positives and negatives are those of an epoch that nobody has disturbed."""
    states: dict[int, Any] = {}
    seen = []
    for world, steps in ((2, 2), (1, 3), (3, None)):
        state = states.get(0)
        for rank in range(world):
            with opened(folder, rank=rank, world=world) as stream:
                if state is None:
                    stream.set_epoch(1)
                else:
                    stream.load_state_dict(state)
                for batch in islice(stream, steps):
                    seen.append(batch)
                    states[rank] = stream.state_dict()
        assert states[0]["epoch"] == (2 if steps is None else 1)
    assert targets(seen) == targets(read(folder, EACH, epoch=1))


def test_by_frequency_or_all_alike(folder: Path) -> None:
    table = pq.read_table(folder / "items.parquet")
    frequency = dict(zip(table["id"].to_pylist(), table["frequency"].to_pylist(), strict=True))
    items = owned(folder)
    for draw in ("frequency", "uniform"):
        drawn = [
            target
            for epoch in range(8)
            for target in targets(read(folder, EACH, draw, epoch=epoch)).elements()
            if not target[4]
        ]
        # Of each user the weights of what it may get; over all of its draws, what is expected of each item.
        expected = dict.fromkeys(frequency, 0.0)
        for user, number in Counter(target[0] for target in drawn).items():
            weights = {i: n if draw == "frequency" else 1 for i, n in frequency.items() if i not in items[user]}
            for item, weight in weights.items():
                expected[item] += number * weight / sum(weights.values())
        found = Counter(target[2] for target in drawn)
        chi_squared = sum((found[item] - mean) ** 2 / mean for item, mean in expected.items() if mean > 0)
        # Its mean is the number of items, its deviation the root of twice that.
        assert chi_squared < len(frequency) + 4 * (2 * len(frequency)) ** 0.5


def test_other_splits_keep_theirs(folder: Path) -> None:
    for split in SPLITS[1:]:
        assert targets(read(folder, EACH, split=split)) == targets(read(folder, None, split=split))


def test_a_sample_of_users(folder: Path) -> None:
    some, everyone = targets(read(folder, user_fraction=0.4)), targets(read(folder))
    assert some == Counter({t: n for t, n in everyone.items() if t[0] in {target[0] for target in some}})
    assert 0 < sum(some.values()) < sum(everyone.values())


def positive(item: int, label: int = 1) -> Target:
    return Target(item, 1 + (item - 1) % 7, 10_000 + item, label, Split.TRAIN, 2)


def test_a_user_who_has_nearly_everything_gets_the_rest(tmp_path: Path) -> None:
    items = [item for item in range(1, 51) if item not in (7, 33)]
    times = list(range(len(items)))
    of_all = User(1, items, [1] * len(items), times, [positive(3), positive(9)])
    write_dataset(tmp_path / "rest", [of_all])
    drawn = [target for epoch in range(6) for target in targets(read(tmp_path / "rest", epoch=epoch)).elements()]
    assert {target[2] for target in drawn if not target[4]} == {7, 33}
    # A positive that is in no history is the user's too.
    write_dataset(tmp_path / "positive", [User(1, items, [1] * len(items), times, [positive(7)])])
    assert {target[2] for target in targets(read(tmp_path / "positive")) if not target[4]} == {33}
    write_dataset(tmp_path / "none", [User(1, items, [1] * len(items), times, [positive(7), positive(33)])])
    with pytest.raises(UserError) as raised:
        read(tmp_path / "none")
    assert str(raised.value).startswith("stream.negatives: user 1 has every item that could be drawn")


def test_targets_that_were_shown_are_refused(tmp_path: Path) -> None:
    shown = [positive(3), positive(4, 0), positive(5)]
    write_dataset(tmp_path / "data", [User(1, [1, 2], [1, 2], [1, 2], shown)])
    with pytest.raises(UserError, match=r"not every positive has the same number of negatives \(3 targets, 2 pos"):
        read(tmp_path / "data")
    (tmp_path / "shown.csv").write_text("user_id,item_id,category_id,timestamp,label\n1,2,1,50,1\n")
    (tmp_path / "events.csv").write_text("user_id,item_id,category_id,timestamp\n1,2,1,10\n1,3,1,20\n")
    content = {
        "events": {"files": [str(tmp_path / "events.csv")]},
        "impressions": {"files": [str(tmp_path / "shown.csv")]},
        "split": {"kind": "impressions", "min_history": 1, "validation_fraction": 0, "test_fraction": 0},
    }
    prepare(PrepareSettings.model_validate(content), tmp_path / "impressions")
    with pytest.raises(UserError) as raised:
        read(tmp_path / "impressions")
    assert "are impressions, which were shown and not drawn" in str(raised.value)
    assert "\n" not in str(raised.value)
