"""What became of every line: read = kept + left out, by reason, against a count in plain Python."""

import json
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.ingest.prepare import prepare
from schemas.errors import UserError
from schemas.manifest import Counts
from schemas.prepare import PrepareSettings
from schemas.shards import ITEM_FEATURES, RECORDS_OF_A_FILE, Split
from tests.examples import examples
from tests.runs import run_dare

SINCE, UNTIL = 5, 25

Row = tuple[int, int, int, str, bool]
"""user, item, time, type, label."""

lines = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 4), st.integers(0, 30), st.sampled_from(["pv", "buy"]), st.booleans()),
    max_size=60,
)

quick = settings(
    max_examples=examples(8, 60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(path: Path, rows: list[Row]) -> None:
    text = [f"{user},{item},{item % 2},{time},{kind},{int(label)}" for user, item, time, kind, label in rows]
    path.write_text("\n".join(["user_id,item_id,category_id,timestamp,kind,label", *text]) + "\n")


def prepared(folder: Path, split: dict[str, Any], *, shown: bool, **more: Any) -> Counts:
    bounds = {"keep": {"kind": ["pv"]}, "since": SINCE, "until": UNTIL}
    content: dict[str, Any] = {"events": {"files": [str(folder / "events.csv")], **bounds}, "split": split, **more}
    if shown:
        content["impressions"] = {"files": [str(folder / "shown.csv")], **bounds}
    return prepare(PrepareSettings.model_validate(content), folder / "out", overwrite=True).counts


def sorted_out(
    rows: list[tuple[int, int, int, str, bool]],
) -> tuple[list[tuple[int, int, int, str, bool]], Counter[str]]:
    """Lines that pass line by line, and how many do not, by reason."""
    of_kind = [row for row in rows if row[3] == "pv"]
    inside = [row for row in of_kind if SINCE <= row[2] < UNTIL]
    return inside, +Counter(filtered=len(rows) - len(of_kind), outside_time=len(of_kind) - len(inside))


@quick
@given(lines, lines, st.integers(0, 3), st.integers(0, 2))
def test_read_is_kept_and_left_out(
    tmp_path: Path, rows: list[Any], shown: list[Any], min_behaviors: int, min_history: int
) -> None:
    write(tmp_path / "events.csv", rows)
    write(tmp_path / "shown.csv", shown)
    events, events_out = sorted_out(rows)
    impressions, shown_out = sorted_out(shown)
    behaviors = Counter(user for user, *_ in events)
    kept, users_out = [], Counter[str]()
    for number, (user, item, time, _, label) in enumerate(impressions):
        earlier = sum(each[0] == user and each[2] < time for each in events)
        if behaviors[user] >= min_behaviors and earlier >= min_history:
            kept.append((user, item, time, label, number))
        elif not behaviors[user]:
            shown_out["no_events"] += 1
        elif behaviors[user] < min_behaviors:
            shown_out["below_min_behaviors"] += 1
        else:
            shown_out["below_min_history"] += 1
    for user in {*behaviors, *(user for user, *_ in impressions)} - {user for user, *_ in kept}:
        reason = "no_target"
        if not behaviors[user]:
            reason = "no_events"
        elif behaviors[user] < min_behaviors:
            reason = "below_min_behaviors"
        users_out[reason] += 1
        events_out[reason] += behaviors[user]
    split = {"kind": "impressions", "min_behaviors": min_behaviors, "min_history": min_history}
    if not events or not impressions or not kept:
        with pytest.raises(UserError, match=r"no lines|has a target"):
            prepared(tmp_path, split, shown=True)
        return
    counts = prepared(tmp_path, split, shown=True)
    assert counts.events_read == len(rows)
    assert counts.events_left_out == +events_out
    assert counts.behaviors == len(rows) - sum(events_out.values())
    assert counts.impressions_read == len(shown)
    assert counts.impressions_left_out == +shown_out
    assert counts.train.targets + counts.validation.targets + counts.test.targets == len(kept)
    assert counts.users_left_out_by_reason == users_out
    assert counts.events_repeated == sum(n - 1 for n in Counter((row[0], row[1], row[2]) for row in events).values())
    same = Counter((user, item, time, label) for user, item, time, _, label in impressions)
    assert counts.impressions_repeated == sum(n - 1 for n in same.values())
    both = {key[:3] for key in same if key[3]} & {key[:3] for key in same if not key[3]}
    assert counts.impressions_contradictory == len(both)
    # And each target says which line it is.
    found = {}
    for path in (tmp_path / "out").glob("shard-*.parquet"):
        for row in pq.read_table(path).to_pylist():
            for line, time, label in zip(row["target_line"], row["target_timestamp"], row["target_label"], strict=True):
                assert line < RECORDS_OF_A_FILE
                found[line] = (row["user_id"], time, bool(label))
    numbers = [number for number, row in enumerate(shown, 1) if row[3] == "pv" and SINCE <= row[2] < UNTIL]
    assert found == {numbers[number]: (user, time, label) for user, _, time, label, number in kept}


@quick
@given(lines, st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(0, 2))
def test_split_by_date(tmp_path: Path, rows: list[Any], train: int, stride: int, validation: int, test: int) -> None:
    write(tmp_path / "events.csv", rows)
    events, _ = sorted_out(rows)
    expected = Counter[tuple[int, int, int]]()
    for user in {user for user, *_ in events}:
        mine = sorted((time, item) for each, item, time, *_ in events if each == user)
        for split, first, last, number, step in (
            (Split.TRAIN, 0, 12, train, stride),
            (Split.VALIDATION, 12, 18, validation, 1),
            (Split.TEST, 18, 99, test, 1),
        ):
            period = [(time, item) for time, item in mine if first <= time < last]
            chosen = [time for time, _ in period[::-1][::step][:number] if time > mine[0][0]]
            expected.update((user, split, time) for time in chosen)
    settings = {
        "kind": "by_date",
        "validation_from": 12,
        "test_from": "1970-01-01T00:00:18",
        "train_targets": train,
        "train_stride": stride,
        "validation_targets": validation,
        "test_targets": test,
        "negatives": 0,
    }
    if not expected:
        with pytest.raises(UserError, match=r"no lines|has a target"):
            prepared(tmp_path, settings, shown=False)
        return
    counts = prepared(tmp_path, settings, shown=False)
    seen = Counter[tuple[int, int, int]]()
    for path in (tmp_path / "out").glob("shard-*.parquet"):
        for row in pq.read_table(path).to_pylist():
            pairs = zip(row["target_split"], row["target_timestamp"], strict=True)
            seen.update((row["user_id"], split, time) for split, time in pairs)
    assert seen == expected
    assert counts.events_read == counts.behaviors + sum(counts.events_left_out.values())


def test_impressions_are_split_by_date(tmp_path: Path) -> None:
    write(tmp_path / "events.csv", [(1, item, 6 + item, "pv", True) for item in range(1, 5)])
    write(tmp_path / "shown.csv", [(1, 1, time, "pv", time % 2 == 0) for time in range(8, 25)])
    counts = prepared(tmp_path, {"kind": "by_date", "validation_from": 15, "test_from": 20}, shown=True)
    assert [getattr(counts, split).targets for split in ("train", "validation", "test")] == [7, 5, 5]


def test_the_command_line_leaves_the_split_of_impressions_to_a_settings_file(tmp_path: Path) -> None:
    write(tmp_path / "events.csv", [(1, item, 6 + item, "pv", True) for item in range(1, 5)])
    write(tmp_path / "shown.csv", [(1, 1, time, "pv", time % 2 == 0) for time in range(8, 25)])
    (tmp_path / "my.yaml").write_text("split: {kind: by_date, validation_from: 15, test_from: 1970-01-01T00:00:20Z}")
    command = ["prepare", "--events", tmp_path / "events.csv", "--impressions", tmp_path / "shown.csv"]
    for more, said in (
        ([], "13 train, 2 validation, 2 test"),
        (["--config", tmp_path / "my.yaml"], "7 train, 5 validation, 5 test"),
    ):
        code, told, errors = run_dare(tmp_path, *command, "--out", tmp_path / f"out{len(more)}", *more)
        assert code == 0, errors
        assert said in told


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    good = [(user, item, 6 + item, "pv", True) for user in range(3) for item in range(1, 6)]
    write(tmp_path / "events.csv", good + [(7, 1, 9, "buy", True)] * 20 + [(8, 1, 2, "pv", True)] * 5)
    # Named three times, counted once.
    command = ["prepare", "--out", tmp_path / "out", "--json", "events.keep={kind: [pv]}", "events.since=5"]
    for name in ("events.csv", "./events.csv", "event*.csv"):
        command += ["--events", f"{tmp_path}/{name}"]
    command += ["split.min_behaviors=1", "split.negatives=0", "split.train_targets=2", "split.train_stride=1"]
    code, output, errors = run_dare(tmp_path, *command)
    assert code == 0, errors
    assert "events: 40 read, 15 kept, 20 filtered, 5 outside time; 0 repeat another one" in output
    assert (
        "more than half of the events are left out, 25 of 40: 20 none of the values in events.keep, 5 not from "
        "events.since to events.until"
    ) in errors
    assert "named more than once; read once" in errors
    told = json.loads(output.splitlines()[-1])
    assert (told["events_read"], told["events_left_out"]) == (40, {"filtered": 20, "outside_time": 5})
    code, shown, errors = run_dare(tmp_path, "inspect", tmp_path / "out")
    assert code == 0, errors
    for line in ("events read +40", "filtered +20", "outside time +5", "kept +15"):
        assert re.search(line, shown), shown


def test_nothing_left_names_the_setting(tmp_path: Path) -> None:
    write(tmp_path / "events.csv", [(1, 1, 9, "buy", True)] * 3)
    with pytest.raises(UserError, match=r"no lines in .*: of 3 in the files 3 are none of the values in events.keep"):
        prepared(tmp_path, {"kind": "paper"}, shown=False)
    write(tmp_path / "events.csv", [(1, item, 9, "pv", True) for item in (1, 2, 3)])
    with pytest.raises(UserError, match=r"none of 1 users .* 1 with fewer behaviours than split.min_behaviors=210"):
        prepared(tmp_path, {"kind": "paper"}, shown=False)


def test_a_file_of_items_says_the_categories_of_both_logs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of items that were only shown as well; those that it does not know are counted."""
    (tmp_path / "events.csv").write_text(
        "user_id,item_id,timestamp\n" + "".join(f"1,{item},{item}\n" for item in "123")
    )
    (tmp_path / "shown.csv").write_text("user_id,item_id,category_id,timestamp,label\n1,2,77,9,1\n1,8,77,9,0\n")
    (tmp_path / "items.csv").write_text("item_id,category_id\n1,10\n2,20\n8,80\n")
    content = {
        "events": {
            "files": [str(tmp_path / "events.csv")],
            "category_id": None,
            "item_features": {"files": [str(tmp_path / "items.csv")]},
        },
        "impressions": {"files": [str(tmp_path / "shown.csv")]},
        "split": {"kind": "impressions"},
    }
    logging.getLogger("dare").propagate = True
    with caplog.at_level(logging.INFO, "dare.data"):
        prepare(PrepareSettings.model_validate(content), tmp_path / "out")
    dictionary = pq.read_table(tmp_path / "out" / "feature-category.parquet").to_pylist()
    name = {row["id"]: row["raw_id"] for row in dictionary}
    with pa.ipc.open_file(str(tmp_path / "out" / ITEM_FEATURES)) as file:
        category = file.read_all()["category"].to_pylist()
    items = pq.read_table(tmp_path / "out" / "items.parquet").to_pylist()
    assert {row["raw_id"]: name.get(category[row["id"]]) for row in items} == {1: 10, 2: 20, 3: None, 8: 80}
    assert "feature category: 1 items have no value in its file; theirs is the unknown" in caplog.text
