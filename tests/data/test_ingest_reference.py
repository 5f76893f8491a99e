"""Data sets made by ``prepare`` against a slow reference in plain Python."""

import csv
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.ingest.prepare import prepare
from schemas.manifest import Manifest
from schemas.prepare import PrepareSettings
from schemas.shards import ITEM_FEATURES, SPLITS
from tests.examples import examples

Event = tuple[int, int, int, int]
"""user, item, category, timestamp."""

events = st.lists(
    st.tuples(
        st.sampled_from([0, 3, 2**31 + 5, 2**63 - 1]),
        st.one_of(st.integers(0, 12), st.sampled_from([2**40, 2**63 - 1])),
        st.integers(0, 3),
        st.integers(0, 25),
    ),
    min_size=1,
    max_size=150,
)


def write_events(path: Path, rows: list[Event]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("user_id", "item_id", "category_id", "timestamp"), *rows])


def run(folder: Path, rows: list[Event], split: dict[str, Any], **more: Any) -> tuple[Manifest, dict[int, dict]]:
    """Prepare the events; returns the manifest and each user's row with raw ids in place of dense ones."""
    write_events(folder / "events.csv", rows)
    content = {"events": {"files": [str(folder / "events.csv")]}, "split": split, **more}
    manifest = prepare(PrepareSettings.model_validate(content), folder / "out", overwrite=True)
    return manifest, read(folder / "out", manifest)


def read(folder: Path, manifest: Manifest) -> dict[int, dict]:
    raw = {name: {0: None} for name in ("item", "category")}
    for name, file in (("item", "items"), ("category", "feature-category")):
        for row in pq.read_table(folder / f"{file}.parquet").to_pylist():
            assert row["id"] not in raw[name], "dense ids are unique"
            raw[name][row["id"]] = row["raw_id"]
        assert sorted(raw[name]) == list(range(len(raw[name]))), "dense ids have no gaps"
    with pa.ipc.open_file(str(folder / ITEM_FEATURES)) as file:
        category = file.read_all()["category"].to_pylist()
    assert len(category) == 1 + manifest.counts.items
    assert category[0] == 0
    users = {}
    for shard in manifest.shards:
        table = pq.read_table(folder / shard.path)
        assert table.schema.equals(manifest.shard_schema)
        for row in table.to_pylist():
            for side in ("history", "target"):
                items = row[f"{side}_item"]
                row[f"{side}_category"] = [raw["category"][category[item]] for item in items]
                row[f"{side}_item"] = [raw["item"][item] for item in items]
            users[row["user_id"]] = row
    return users


def by_user(rows: list[Event]) -> dict[int, list[Event]]:
    users = defaultdict(list)
    for row in rows:
        users[row[0]].append(row)
    return users


def last_category(rows: list[Event]) -> dict[int, int]:
    return {item: category for _, category, item in sorted((time, category, item) for _, item, category, time in rows)}


def check_common(rows: list[Event], users: dict[int, dict], negatives: int) -> None:
    """What holds for every split: order, categories, point in time, negatives."""
    category = last_category(rows)
    for user, row in users.items():
        mine = by_user(rows)[user]
        times = sorted(time for *_, time in mine)
        assert row["history_timestamp"] == times
        assert Counter(zip(row["history_item"], row["history_timestamp"], strict=True)) == Counter(
            (item, time) for _, item, _, time in mine
        )
        assert row["history_category"] == [category[item] for item in row["history_item"]]
        assert row["target_category"] == [category[item] for item in row["target_item"]]
        touched = {item for _, item, *_ in mine}
        for index, (item, label) in enumerate(zip(row["target_item"], row["target_label"], strict=True)):
            end, time = row["target_history_end"][index], row["target_timestamp"][index]
            assert end == sum(past < time for past in times), "history is what is strictly earlier"
            assert label == (index % (1 + negatives) == 0), "a positive, then its negatives"
            assert (item in touched) == bool(label)


def feasible(rows: list[Event]) -> bool:
    """No user has touched every item."""
    items = {item for _, item, *_ in rows}
    return all({item for _, item, *_ in mine} != items for mine in by_user(rows).values())


quick = settings(
    max_examples=examples(10, 60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(rows=events, stride=st.integers(1, 3), train=st.integers(0, 5), min_behaviors=st.integers(1, 20))
def test_paper_split(tmp_path: Path, rows: list[Event], stride: int, train: int, min_behaviors: int) -> None:
    negatives = 2 if feasible(rows) else 0
    split = {
        "kind": "paper",
        "train_stride": stride,
        "train_targets": train,
        "min_behaviors": min_behaviors,
        "negatives": negatives,
    }
    expected = {}
    for user, mine in by_user(rows).items():
        count = len(mine)
        times = sorted(time for *_, time in mine)
        numbers = [(count, "test"), (count - 1, "validation")]
        numbers += [(count - 2 - stride * j, "train") for j in range(train)]
        chosen = [(number, name) for number, name in sorted(numbers) if number >= 1 and times[number - 1] > times[0]]
        if count >= min_behaviors and chosen:
            expected[user] = [(times[number - 1], name) for number, name in chosen]
    if not expected:
        with pytest.raises(ValueError, match="has a target"):
            run(tmp_path, rows, split)
        return
    manifest, users = run(tmp_path, rows, split, shards={"behaviors_per_shard": 40, "users_per_row_group": 2})
    check_common(rows, users, negatives)
    targets = {
        user: [
            (row["target_timestamp"][i], SPLITS[row["target_split"][i]])
            for i in range(0, len(row["target_item"]), 1 + negatives)
        ]
        for user, row in users.items()
    }
    assert targets == expected
    assert manifest.counts.users == len(users)
    assert manifest.counts.users_left_out == len(by_user(rows)) - len(users)
    assert manifest.counts.behaviors == sum(len(row["history_item"]) for row in users.values())
    for code, name in enumerate(SPLITS):
        of_split = sum(row["target_split"].count(code) for row in users.values())
        assert getattr(manifest.counts, name).targets == of_split


@quick
@given(
    rows=events,
    test=st.integers(0, 3),
    validation=st.integers(0, 3),
    per_group=st.integers(1, 3),
    min_history=st.integers(0, 10),
)
def test_by_timestamp(
    tmp_path: Path, rows: list[Event], test: int, validation: int, per_group: int, min_history: int
) -> None:
    negatives = 1 if feasible(rows) else 0
    split = {
        "kind": "by_timestamp",
        "test_groups": test,
        "validation_groups": validation,
        "targets_per_group": per_group,
        "min_history": min_history,
        "negatives": negatives,
    }
    expected = {}
    for user, mine in by_user(rows).items():
        groups = sorted({time for *_, time in mine})
        for later, time in enumerate(reversed(groups)):
            name = "test" if later < test else "validation" if later < test + validation else "train"
            items = {item for _, item, _, when in mine if when == time}
            if sum(when < time for *_, when in mine) >= min_history:
                expected[user, time] = (name, items)
    if not expected:
        with pytest.raises(ValueError, match="has a target"):
            run(tmp_path, rows, split)
        return
    _, users = run(tmp_path, rows, split)
    check_common(rows, users, negatives)
    chosen = defaultdict(list)
    for user, row in users.items():
        for i in range(0, len(row["target_item"]), 1 + negatives):
            chosen[user, row["target_timestamp"][i]].append((SPLITS[row["target_split"][i]], row["target_item"][i]))
    assert chosen.keys() == expected.keys()
    for key, targets in chosen.items():
        name, items = expected[key]
        assert {split_name for split_name, _ in targets} == {name}
        assert len(targets) == len({item for _, item in targets}) == min(per_group, len(items))
        assert {item for _, item in targets} <= items


def test_impressions(tmp_path: Path) -> None:
    write_events(tmp_path / "events.csv", [(1, 10, 7, 5), (1, 11, 7, 5), (1, 12, 8, 9), (2, 10, 7, 4)])
    (tmp_path / "shown.csv").write_text(
        "user_id,item_id,category_id,timestamp,label,split,scene\n"
        "1,12,8,9,1,test,home\n1,99,9,5,0,train,\n2,11,7,6,1,validation,cart\n3,11,7,6,1,train,home\n1,10,7,12,0,train,home\n"
    )
    content = {
        "events": {"files": [str(tmp_path / "events.csv")]},
        "impressions": {"files": [str(tmp_path / "shown.csv")], "split": "split"},
        "split": {"kind": "impressions", "min_history": 0},
    }
    manifest = prepare(PrepareSettings.model_validate(content), tmp_path / "out")
    users = read(tmp_path / "out", manifest)
    targets = {
        user: list(
            zip(
                row["target_item"],
                row["target_timestamp"],
                row["target_label"],
                [SPLITS[code] for code in row["target_split"]],
                row["target_history_end"],
                strict=True,
            )
        )
        for user, row in users.items()
    }
    assert targets == {
        1: [(99, 5, 0, "train", 0), (12, 9, 1, "test", 2), (10, 12, 0, "train", 3)],
        2: [(11, 6, 1, "validation", 1)],
        3: [(11, 6, 1, "train", 0)],
    }
    assert users[1]["history_item"] in ([10, 11, 12], [11, 10, 12])
    assert users[3]["history_item"] == []
    assert manifest.counts.items == 4, "items that were only shown have an id"
    assert manifest.counts.train.positives == 1


def test_impressions_cut_by_time(tmp_path: Path) -> None:
    write_events(tmp_path / "events.csv", [(user, 1, 1, 0) for user in range(10)])
    lines = [f"{user},1,1,{10 + time},{time % 2}" for user in range(10) for time in range(10)]
    (tmp_path / "shown.csv").write_text("\n".join(["user_id,item_id,category_id,timestamp,label", *lines]))
    content = {
        "events": {"files": [str(tmp_path / "events.csv")]},
        "impressions": {"files": [str(tmp_path / "shown.csv")]},
        "split": {"kind": "impressions", "test_fraction": 0.2, "validation_fraction": 0.1},
    }
    manifest = prepare(PrepareSettings.model_validate(content), tmp_path / "out")
    assert [getattr(manifest.counts, name).targets for name in SPLITS] == [70, 10, 20]
    latest = [0, 0, 0]
    for row in read(tmp_path / "out", manifest).values():
        for code, time in zip(row["target_split"], row["target_timestamp"], strict=True):
            latest[code] = max(latest[code], time)
    assert latest == [16, 17, 19]


def test_behavior_and_scene(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(
        "user_id,item_id,category_id,timestamp,kind,place\n1,5,1,1,click,home\n1,6,1,2,cart,\n1,7,1,3,click,search\n2,8,1,1,buy,home\n"
    )
    content = {
        "events": {"files": [str(tmp_path / "events.csv")], "behavior": "kind", "scene": "place"},
        "split": {"kind": "paper", "min_behaviors": 1, "negatives": 1},
    }
    manifest = prepare(PrepareSettings.model_validate(content), tmp_path / "out")
    row = read(tmp_path / "out", manifest)[1]
    raw = {}
    for name in ("behavior", "scene"):
        dictionary = pq.read_table(tmp_path / "out" / f"feature-{name}.parquet").to_pylist()
        raw[name] = {each["id"]: each["raw_id"] for each in dictionary} | {0: None}
    assert [raw["behavior"][id] for id in row["history_behavior"]] == ["click", "cart", "click"]
    assert [raw["scene"][id] for id in row["history_scene"]] == ["home", None, "search"]
    assert [raw["scene"][id] for id in row["target_scene"]] == [None, None, "search", "search"]


def test_negatives_follow_frequency(tmp_path: Path) -> None:
    # Items 1 .. 4 are seen 100, 200, 300 and 400 times by users who are left out; user 0 draws from them.
    rows = [(1 + n, item, 0, n % 7) for item in (1, 2, 3, 4) for n in range(100 * item)]
    rows += [(0, 9, 0, time) for time in range(2_002)]
    split = {"kind": "paper", "min_behaviors": 2_000, "train_targets": 1_999, "train_stride": 1, "negatives": 3}
    _, users = run(tmp_path, rows, split)
    drawn = Counter(
        item for item, label in zip(users[0]["target_item"], users[0]["target_label"], strict=True) if not label
    )
    total = sum(drawn.values())
    assert total > 5_900
    for item in (1, 2, 3, 4):
        assert drawn[item] / total == pytest.approx(item / 10, abs=0.02)


def test_changed_category(tmp_path: Path) -> None:
    rows = [(1, 5, 1, 1), (1, 5, 2, 9), (1, 6, 3, 4), (2, 5, 7, 3), (2, 6, 3, 4), (2, 8, 3, 4)]
    manifest, users = run(tmp_path, rows, {"kind": "paper", "min_behaviors": 1, "negatives": 0})
    assert manifest.counts.items_with_changed_category == 1
    assert users[1]["history_category"] == [2, 3, 2]
