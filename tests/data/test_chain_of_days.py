"""Days of a chain against one preparation of the whole log: the same targets with the same histories, as raw values."""

import csv
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipeline.ingest.chain import Base
from pipeline.ingest.day_settings import day_settings
from pipeline.ingest.prepare import prepare
from schemas.errors import UserError
from schemas.manifest import Manifest
from schemas.prepare import PrepareSettings
from schemas.shards import ITEM_FEATURES, UNLABELED, FeatureRecord, Split
from tests.examples import examples

DAY = 100
"""Seconds of a day here."""
FEATURES = [
    {"name": "category", "of": "item", "column": "category"},
    {"name": "action", "of": "behavior", "column": "action"},
    {"name": "tags", "of": "behavior", "kind": "ids", "column": "tags", "separator": " "},
    {"name": "dwell", "of": "behavior", "kind": "number", "column": "dwell", "scale": "standard"},
    {"name": "city", "of": "user", "column": "city"},
    {"name": "age", "of": "user", "kind": "number", "column": "age", "scale": "standard"},
]
SLOT = {"name": "slot", "of": "impression", "column": "slot"}
DWELLS = ["", "1", "10", "1000003"]
"""No mean of these is one of them, if it is of the second and the third at least: what is missing is like the mean."""
NOBODY = {"city": "", "age": ""}
"""What a user has who has said nothing."""


class Event(NamedTuple):
    user_id: str
    item_id: str
    category: str
    action: str
    tags: str
    dwell: str
    city: str
    age: str
    timestamp: int


class Impression(NamedTuple):
    user_id: str
    item_id: str
    slot: str
    label: int
    timestamp: int


class Target(NamedTuple):
    """A target with what a model is shown of it, in raw values."""

    user: str
    time: int
    item: tuple[str, str]
    label: int
    slot: str
    history: list[tuple[int, Any]]
    """Time, and all else."""


def moments(day: int) -> st.SearchStrategy[int]:
    # Some at the same second, and at the first and the last of the day.
    return st.integers(0, 12).map(lambda step: day * DAY + step * (DAY - 1) // 12)


USERS = [str(number) for number in (1, 2, 7, 2**31 - 1, 2**31, 40, 41)]


@st.composite
def logs(draw: st.DrawFn, days: int) -> tuple[list[list[Event]], list[list[Impression]]]:
    """The events and the impressions of each day. Users come as they please: late, once, without a target."""

    def event(day: int) -> st.SearchStrategy[Event]:
        item = st.integers(0, 6)
        parts = [
            st.sampled_from(USERS),
            item,
            st.sampled_from(["", "view", "cart", "buy"]),
            st.sampled_from(["", "a", "b a", "c"]),
            st.sampled_from(DWELLS),
            st.sampled_from(["", "", "Rome", "Oslo"]),
            st.sampled_from(["", "", "20", "30"]),
            moments(day),
        ]
        return st.tuples(*parts).map(lambda row: Event(row[0], str(row[1]), f"c{row[1] % 3}", *row[2:]))

    def impression(day: int) -> st.SearchStrategy[Impression]:
        parts = [st.sampled_from(USERS), st.integers(0, 8).map(str), st.sampled_from(["", "top", "side"])]
        return st.tuples(*parts, st.integers(0, 1), moments(day)).map(lambda row: Impression(*row))

    events = [draw(st.lists(event(day), min_size=1, max_size=12)) for day in range(days)]
    shown = [draw(st.lists(impression(day), min_size=1, max_size=6)) for day in range(days)]
    # The first day has a target, and a mean that no number is.
    for dwell, time in (("1", 0), ("10", DAY - 1)):
        events[0].append(Event(USERS[0], "0", "c0", "view", "a", dwell, "Rome", "20", time))
    shown[0].append(Impression(USERS[0], "1", "top", 1, DAY - 1))
    return events, shown


def write(path: Path, rows: list[Any], *, text: bool) -> str:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0]._fields)
        for row in rows:
            named = row._replace(user_id=f"u{row.user_id}", item_id=f"i{row.item_id}") if text else row
            writer.writerow(named)
    return str(path)


def given_settings(events: str, shown: str | None, keep: int | None, *, text: bool, min_history: int) -> dict[str, Any]:
    kind = "text" if text else "integer"
    log = {"user_type": kind, "item_type": kind, "category_id": None}
    split: dict[str, Any] = {"kind": "impressions", "test_fraction": 0, "validation_fraction": 0}
    if shown is None:
        split = {"kind": "by_timestamp", "test_groups": 0, "validation_groups": 0, "negatives": 0}
        split["targets_per_group"] = 1000
    return {
        "events": {"files": [events], **log},
        "impressions": None if shown is None else {"files": [shown], **log},
        "features": [*FEATURES, *([] if shown is None else [SLOT])],
        "split": {**split, "min_history": min_history},
        "history": {"keep": keep},
        "shards": {"behaviors_per_shard": 7, "users_per_row_group": 2},
        "threads": 1,
    }


class Raw:
    """A data set in raw values."""

    def __init__(self, folder: Path) -> None:
        self.manifest = Manifest.read(folder)
        self.manifest.verify(folder)
        self._folder = folder
        self._values = {each.name: self._of(each) for each in self.manifest.features}
        self._items = {0: None} | {
            row["id"]: str(row["raw_id"]).removeprefix("i")
            for row in pq.read_table(folder / "items.parquet").to_pylist()
        }
        with pa.ipc.open_file(str(folder / ITEM_FEATURES)) as file:
            self._of_items = file.read_all().to_pylist()

    def _of(self, record: FeatureRecord) -> Any:
        if record.is_number:
            assert record.mean is not None
            assert record.deviation is not None
            return lambda value: round(value * record.deviation + record.mean) if value else None
        names = {0: ""}
        for row in pq.read_table(self._folder / f"feature-{record.name}.parquet").to_pylist():
            if row["id"]:
                names[row["id"]] = row["raw_id"]
        if record.kind == "id":
            return names.__getitem__
        with pa.ipc.open_file(str(self._folder / f"bags-{record.name}.arrow")) as file:
            bags = file.read_all()["ids"].to_pylist()
        return lambda bag: frozenset(names[value] for value in bags[bag])

    def item(self, number: int) -> tuple[str, str]:
        return self._items[number], self._values["category"](self._of_items[number]["category"])

    def users(self) -> dict[str, dict[str, Any]]:
        rows = [row for shard in self.manifest.shards for row in pq.read_table(self._folder / shard.path).to_pylist()]
        assert len({row["user_id"] for row in rows}) == len(rows)
        return {str(row["user_id"]).removeprefix("u"): row for row in rows}

    def of_user(self, row: dict[str, Any]) -> dict[str, Any]:
        (age,) = (each for each in self.manifest.features if each.name == "age")
        # What is missing is like the mean.
        return {"city": self._values["city"](row["user_city"]), "age": row["user_age"] * age.deviation + age.mean}

    def targets(self, split: int = Split.TRAIN) -> list[Target]:
        found = []
        for user, row in self.users().items():
            behaviors = [
                (time, (self.item(item), *(self._values[name](row[f"history_{name}"][at]) for name in BEHAVIOR)))
                for at, (time, item) in enumerate(zip(row["history_timestamp"], row["history_item"], strict=True))
            ]
            for at, end in enumerate(row["target_history_end"]):
                time = row["target_timestamp"][at]
                assert end == sum(before < time for before, _ in behaviors), "the history is what is strictly earlier"
                assert row["target_split"][at] == split
                slot = self._values["slot"](row["target_slot"][at]) if "target_slot" in row else ""
                item = self.item(row["target_item"][at])
                found.append(Target(user, time, item, row["target_label"][at], slot, behaviors[:end]))
        return found


BEHAVIOR = ("action", "tags", "dwell")


def same_histories(days: list[tuple[int, Any]], whole: list[tuple[int, Any]], keep: int) -> bool:
    """Whether the last ``keep`` are the same, in any order within a second, and any of those that the limit parts."""
    days, whole = days[-keep:], whole[-keep:]
    if [time for time, _ in days] != [time for time, _ in whole]:
        return False
    return all(
        Counter(each for each in days if each[0] > first) == Counter(each for each in whole if each[0] > first)
        for first, _ in days[:1]
    )


def check(
    folder: Path, days: int, data: st.DataObject, *, text: bool, shown: bool, keep: int, min_history: int
) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    events, impressions = data.draw(logs(days))
    more = {"text": text, "min_history": min_history}

    def paths(name: str, of_events: list[Event], of_shown: list[Impression]) -> tuple[str, str | None]:
        return (
            write(folder / f"{name}.csv", of_events, text=text),
            write(folder / f"{name}-shown.csv", of_shown, text=text) if shown else None,
        )

    log = paths("all", [row for day in events for row in day], [row for day in impressions for row in day])
    prepare(PrepareSettings.model_validate(given_settings(*log, None, **more)), folder / "whole")
    expected = by_day(Raw(folder / "whole"))
    of_impressions = expected
    if not shown:
        log = log[0], write(folder / "all-shown.csv", [row for day in impressions for row in day], text=text)
        prepare(PrepareSettings.model_validate(given_settings(*log, None, **more)), folder / "impressions")
        of_impressions = by_day(Raw(folder / "impressions"))
    known: dict[str, dict[str, str]] = {}
    had_event: set[str] = set()
    for number in range(days):
        log = paths(f"day{number}", events[number], impressions[number])
        if number == 0:
            settings = PrepareSettings.model_validate(given_settings(*log, keep, **more))
            manifest = prepare(settings, folder / "d0")
        else:
            labeled = number % 2 == 0
            scored = score(folder, number, impressions[number], text=text, labeled=labeled)
            met = {row.item_id for rows in events[:number] for row in rows}
            slots = {row.slot for rows in impressions[:number] for row in rows} if shown else set()
            check_scored(
                scored,
                [
                    each._replace(
                        item=(each.item[0], each.item[1] if each.item[0] in met else ""),
                        label=each.label if labeled else UNLABELED,
                        slot=each.slot if each.slot in slots else "",
                        history=history,
                    )
                    for each in of_impressions[number]
                    if len(history := [row for row in each.history if row[0] < number * DAY]) >= min_history
                ],
                keep,
            )
            check_users(scored, known)
            base = Base.open(folder / f"d{number - 1}", closed=False)
            values = {"events": {"files": [log[0]]}} | ({"impressions": {"files": [log[1]]}} if shown else {})
            manifest = prepare(day_settings(base, values=values), folder / f"d{number}", base=base)
        day = Raw(folder / f"d{number}")
        assert day.manifest == manifest
        for name in NOBODY:
            # Of one moment, the larger value.
            for row in sorted(events[number], key=lambda row: (row.timestamp, getattr(row, name))):
                if value := getattr(row, name):
                    known.setdefault(row.user_id, dict(NOBODY))[name] = value
        assert manifest.chain is not None
        if number:
            # What has only been shown so far has no category yet.
            met = {row.item_id for rows in events[: number + 1] for row in rows}
            got, wanted = (
                day.targets(),
                [each if each.item[0] in met else each._replace(item=(each.item[0], "")) for each in expected[number]],
            )
            assert Counter(each[:5] for each in got) == Counter(each[:5] for each in wanted)
            history = {(each.user, each.time): each.history for each in wanted}
            for target in got:
                assert same_histories(target.history, history[target.user, target.time], keep)
            named = {row.user_id for row in events[number]} | {row.user_id for row in impressions[number] if shown}
            assert manifest.chain.new_users == len(named - had_event)
        had_event |= {row.user_id for row in events[number]}
        check_users(day, known)
        shutil.rmtree(folder / f"d{number - 1}", ignore_errors=True)
        check_layers(manifest, events[: number + 1], keep)


def by_day(whole: Raw) -> dict[int, list[Target]]:
    found: dict[int, list[Target]] = defaultdict(list)
    for target in whole.targets():
        found[target.time // DAY].append(target)
    return found


def score(folder: Path, number: int, impressions: list[Impression], *, text: bool, labeled: bool) -> Raw:
    """A day's impressions alone, with the histories of the day before."""
    named = [row._replace(user_id=f"u{row.user_id}", item_id=f"i{row.item_id}") if text else row for row in impressions]
    columns = [name for name in Impression._fields if labeled or name != "label"]
    with (folder / "tomorrow.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row._asdict() for row in named)
    base = Base.open(folder / f"d{number - 1}", closed=False)
    values = {"impressions": {"files": [str(folder / "tomorrow.csv")], "category_id": None}}
    manifest = prepare(day_settings(base, values=values), folder / f"s{number}", base=base)
    assert manifest.labeled is labeled
    assert manifest.dictionaries_of == base.fingerprint
    assert manifest.item_rows == base.manifest.item_rows
    with pytest.raises(UserError, match=f"extend day {number - 1} of the chain"):
        Base.open(folder / f"s{number}", closed=False)
    return Raw(folder / f"s{number}")


def check_scored(day: Raw, wanted: list[Target], keep: int) -> None:
    got = day.targets(Split.TEST)
    assert Counter(each[:5] for each in got) == Counter(each[:5] for each in wanted)
    history = {(each.user, each.time): each.history for each in wanted}
    for target in got:
        assert same_histories(target.history, history[target.user, target.time], keep)


def check_users(day: Raw, known: dict[str, dict[str, str]]) -> None:
    """What belongs to users is what they have said last, on this day or before."""
    (age,) = (each for each in day.manifest.features if each.name == "age")
    for user, row in day.users().items():
        said = known.get(user, NOBODY)
        expected = float(said["age"]) if said["age"] else age.mean
        assert day.of_user(row) == {"city": said["city"], "age": pytest.approx(expected, abs=1e-3)}


def check_layers(manifest: Manifest, events: list[list[Event]], keep: int) -> None:
    """Layers cover all days, and have the behaviours of all users but what is beyond ``keep``."""
    assert manifest.chain is not None
    ends = [(layer.first_day, layer.last_day) for layer in manifest.chain.layers]
    assert [first for first, _ in ends] == [0, *(last + 1 for _, last in ends[:-1])]
    assert ends[-1][1] == len(events) - 1
    for (first, last), layer in zip(ends, manifest.chain.layers, strict=True):
        mine = Counter(row.user_id for day in events[first : last + 1] for row in day)
        assert layer.behaviors == sum(min(count, keep) for count in mine.values())


options = settings(
    max_examples=examples(2, 12),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    # An example takes a second: to make it smaller would take minutes.
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)


@options
@given(
    data=st.data(),
    days=st.integers(2, 6),
    text=st.booleans(),
    shown=st.booleans(),
    keep=st.sampled_from([1, 2, 3, 50]),
    min_history=st.integers(0, 1),
)
def test_days_are_the_whole_log(
    tmp_path: Path, data: st.DataObject, days: int, text: bool, shown: bool, keep: int, min_history: int
) -> None:
    min_history = min_history if shown else 1
    check(tmp_path / "run", days, data, text=text, shown=shown, keep=keep, min_history=min_history)


@pytest.mark.slow
@settings(options, max_examples=examples(2, 8))
@given(data=st.data(), text=st.booleans(), shown=st.booleans(), keep=st.sampled_from([2, 4, 100]))
def test_thirty_days_are_the_whole_log(tmp_path: Path, data: st.DataObject, text: bool, shown: bool, keep: int) -> None:
    check(tmp_path / "run", 30, data, text=text, shown=shown, keep=keep, min_history=1)
