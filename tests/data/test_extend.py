"""Numbers of a chain of days, against a plain recomputation: ids, frequencies, rows, places, features of items."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.ingest.chain import Base
from pipeline.ingest.day_settings import day_settings
from pipeline.ingest.prepare import prepare
from pipeline.ingest.rows import ItemRows, assign_rows
from schemas.manifest import Manifest
from schemas.prepare import Eviction, PrepareSettings
from schemas.row_layout import RowLayout
from schemas.shards import ITEM_FEATURES
from tests.examples import examples

DAY = 86_400
Row = dict[str, Any]
TYPES = pa.schema(
    {"user": pa.int64(), "item": pa.int64(), "time": pa.int64(), "shelf": pa.string(), "kind": pa.string()}
    | {"tags": pa.list_(pa.string()), "price": pa.float64(), "click": pa.bool_()}
)
line = st.fixed_dictionaries(
    {
        "user": st.integers(1, 4),
        "item": st.integers(1, 9),
        "time": st.integers(0, DAY - 1),
        "shelf": st.sampled_from([None, "a", "b", "c"]),
        "kind": st.sampled_from([None, "view", "cart", "buy"]),
        "tags": st.lists(st.sampled_from(["x", "y", "z"]), max_size=2),
        "price": st.sampled_from([None, 1.0, 2.0, 30.0]),
        "click": st.booleans(),
    }
)
days = st.lists(
    st.tuples(
        st.lists(line, min_size=1, max_size=12),
        st.lists(line, min_size=1, max_size=4),
        # Brands of items, for some of them in a file of the day; None: the day has no such file.
        st.none() | st.dictionaries(st.integers(1, 9), st.sampled_from(["p", "q", "r"]), min_size=1),
    ),
    min_size=2,
    max_size=4,
)
quick = settings(
    max_examples=examples(2, 20), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write_day(folder: Path, number: int, events: list[Row], shown: list[Row], text: bool) -> dict[str, Any]:
    """Write a day's logs; returns the settings that name them."""
    kind = pa.string() if text else pa.int64()
    for name, lines in (("events", events), ("shown", shown)):
        table = pa.Table.from_pylist([row | {"time": row["time"] + number * DAY} for row in lines], TYPES)
        for column in ("user", "item"):
            table = table.set_column(table.column_names.index(column), column, table[column].cast(kind))
        pq.write_table(table, folder / f"{name}{number}.parquet")
    return {
        "events": {"files": [str(folder / f"events{number}.parquet")]},
        "impressions": {"files": [str(folder / f"shown{number}.parquet")]},
    }


def first_settings(files: dict[str, Any], brands: Path, text: bool, **more: Any) -> dict[str, Any]:
    kind = "text" if text else "integer"
    log = {"user_id": "user", "item_id": "item", "timestamp": "time", "user_type": kind, "item_type": kind}
    log |= {"category_id": None}
    features = [
        {"name": "category", "of": "item", "column": "shelf", "min_count": 2},
        {"name": "tags", "of": "item", "kind": "ids", "column": "tags", "min_count": 3},
        {"name": "price", "of": "item", "kind": "number", "column": "price", "buckets": 2},
        {"name": "brand", "of": "item", "column": "brand", "file": str(brands)},
        {"name": "kind", "of": "behavior", "column": "kind", "min_count": 2},
    ]
    return {
        "events": files["events"] | log,
        "impressions": files["impressions"] | log | {"label": "click"},
        "split": {"kind": "impressions", "min_history": 0, "test_fraction": 0, "validation_fraction": 0},
        "features": features,
        "history": {"keep": 10},
    } | more


def write_brands(path: Path, brands: dict[int, str], text: bool) -> None:
    items = pa.array(list(brands), pa.int64()).cast(pa.string() if text else pa.int64())
    pq.write_table(pa.table({"item": items, "brand": pa.array(list(brands.values()), pa.string())}), path)


def extend(base: Path, out: Path, values: dict[str, Any], **more: Any) -> Manifest:
    opened = Base.open(base, closed=False)
    return prepare(day_settings(opened, [more], [], values), out, base=opened)


@dataclass
class Model:
    """What a reader of all days would say, in dictionaries by raw id."""

    min_count: int
    eviction: Eviction = field(default_factory=Eviction)
    events: list[Row] = field(default_factory=list)
    lines: list[Row] = field(default_factory=list)
    brand: dict[int, str] = field(default_factory=dict)
    row: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Item -> (row, day)."""
    largest: int = 0
    evicted: int = 0
    admitted: dict[str, set[str]] = field(default_factory=lambda: {"category": set(), "tags": set(), "kind": set()})

    def add(self, day: int, events: list[Row], shown: list[Row], brands: dict[int, str] | None) -> None:
        moved = [[row | {"time": row["time"] + day * DAY} for row in rows] for rows in (events, shown)]
        self.events += moved[0]
        self.lines += moved[0] + moved[1]
        known = {row["item"] for row in moved[0] + moved[1]}
        # A file says what the items of the day's logs are; of others the days on which they come.
        self.brand |= {item: brand for item, brand in (brands or {}).items() if item in known}

    @property
    def frequency(self) -> dict[int, int]:
        count = Counter(row["item"] for row in self.events)
        return {row["item"]: count[row["item"]] for row in self.lines}

    @property
    def last_seen(self) -> dict[int, int]:
        return {item: max(row["time"] for row in self.lines if row["item"] == item) for item in self.frequency}

    def last(self, item: int, column: str) -> Any:
        values = [(row["time"], row[column]) for row in self.lines if row["item"] == item and row[column] is not None]
        return max(values)[1] if values else None

    def values(self) -> dict[str, Counter[str]]:
        """Frequency of each raw value of the features that have a dictionary and a least count."""
        counts: dict[str, Counter[str]] = {"category": Counter(), "tags": Counter(), "kind": Counter()}
        for item, frequency in self.frequency.items():
            if (shelf := self.last(item, "shelf")) is not None:
                counts["category"][shelf] += frequency
            for tag in self.tags(item):
                counts["tags"][tag] += frequency
        counts["kind"].update(row["kind"] for row in self.events if row["kind"] is not None)
        for name, least in (("category", 2), ("tags", 3), ("kind", 2)):
            self.admitted[name] |= {value for value, count in counts[name].items() if count >= least}
        return counts

    def tags(self, item: int) -> tuple[str, ...]:
        sets = [(row["time"], tuple(sorted(set(row["tags"])))) for row in self.lines if row["item"] == item]
        sets = [(time, tags) for time, tags in sets if tags]
        return max(sets)[1] if sets else ()

    def give_rows(self, day: int, seen: set[int], id_of: dict[int, int]) -> None:
        frequency, last_seen, now = self.frequency, self.last_seen, max(row["time"] for row in self.lines)
        holders = set(self.row)
        getting = {i for i in seen - holders if self.min_count == 1 or frequency[i] >= self.min_count}
        staying = set(holders)
        if self.eviction.unseen_days is not None and day:
            recent = {item for item in frequency if last_seen[item] > now - self.eviction.unseen_days * DAY}
            staying, getting = staying & recent, getting & recent
        if self.eviction.rows is not None:

            def worth(item: int) -> tuple[int, int, int]:
                both = last_seen[item], frequency[item]
                return (*(both if self.eviction.by == "recency" else both[::-1]), -id_of[item])

            best = set(sorted(staying | getting, key=worth, reverse=True)[: self.eviction.rows])
            staying, getting = staying & best, getting & best
        self.evicted = len(holders - staying)
        self.row = {item: self.row[item] for item in staying}
        for item in sorted(getting, key=id_of.__getitem__):
            taken = {row for row, _ in self.row.values()}
            row = next(row for row in range(1, len(taken) + 2) if row not in taken)
            self.row[item] = row, day
            self.largest = max(self.largest, row)


class Written:
    """A data set with raw values in the place of ids."""

    def __init__(self, folder: Path) -> None:
        self.manifest = Manifest.read(folder)
        self.manifest.verify(folder)
        self.items = {int(row["raw_id"]): row for row in pq.read_table(folder / "items.parquet").to_pylist()}
        self.values = {
            each.name: {row["raw_id"]: row for row in pq.read_table(folder / str(each.dictionary)).to_pylist()}
            for each in self.manifest.features
            if each.dictionary is not None
        }
        with pa.ipc.open_file(str(folder / ITEM_FEATURES)) as file:
            self.features = file.read_all().to_pydict()
        with pa.ipc.open_file(str(folder / "bags-tags.arrow")) as file:
            self.bags = file.read_all()["ids"].to_pylist()

    def raw(self, name: str, id: int) -> Any:
        return next((raw for raw, row in self.values[name].items() if row["id"] == id), None) if id else None


def check(written: Written, model: Model, day: int, before: Written | None) -> None:
    chain = written.manifest.chain
    assert chain is not None
    items = written.items
    # Numbers.
    assert {item: row["frequency"] for item, row in items.items()} == model.frequency
    assert {item: row["last_seen"] for item, row in items.items()} == model.last_seen
    assert sorted(row["id"] for row in items.values()) == list(range(1, len(items) + 1))
    assert written.manifest.counts.items == len(items)
    if before is not None:
        assert {item: row["id"] for item, row in before.items.items()} == {
            item: items[item]["id"] for item in before.items
        }
        assert chain.new_items == len(items) - len(before.items)
    # Rows.
    id_of = {item: row["id"] for item, row in items.items()}
    seen = {row["item"] for row in model.lines if row["time"] >= day * DAY}
    model.give_rows(day, seen, id_of)
    assert {item: (row["row"], row["row_day"]) for item, row in items.items() if row["row"]} == model.row
    assert (chain.rows, chain.evicted) == (model.largest, model.evicted)
    assert chain.rows_given == sum(got == day for _, got in model.row.values())
    assert chain.rows_free == model.largest - len(model.row)
    layout = RowLayout.of(model.largest)
    place = np.zeros(len(items) + 1, np.int32)
    for row in items.values():
        place[row["id"]] = layout.place(np.array([row["row"]], np.int32))[0]
    assert written.features["item"] == place.tolist()
    assert written.manifest.placed_items
    assert written.manifest.item_rows == layout.places - 1
    # Values of features: counted on before they are admitted, and admitted for good.
    for name, counts in model.values().items():
        known = written.values[name]
        assert {value: row["frequency"] for value, row in known.items() if row["frequency"]} == +counts
        assert {value for value, row in known.items() if row["id"]} == model.admitted[name]
        ids = sorted(row["id"] for row in known.values() if row["id"])
        assert ids == list(range(1, len(ids) + 1))
        (record,) = [each for each in written.manifest.features if each.name == name]
        assert record.rows == len(ids)
        for value, row in ({} if before is None else before.values[name]).items():
            assert row["id"] in (0, known[value]["id"]), "an id that was given stays"
    # What belongs to items.
    for item, row in items.items():
        of_item = {name: column[row["id"]] for name, column in written.features.items()}
        shelf, tags = model.last(item, "shelf"), model.tags(item)
        assert written.raw("category", of_item["category"]) == (shelf if shelf in model.admitted["category"] else None)
        assert {written.raw("tags", id) for id in written.bags[of_item["tags"]]} == set(tags) & model.admitted["tags"]
        assert written.raw("brand", of_item["brand"]) == model.brand.get(item)
    if before is not None:
        assert written.bags[: len(before.bags)] == before.bags, "histories may carry numbers of sets"
        edges = [next(each.edges for each in w.manifest.features if each.name == "price") for w in (before, written)]
        assert edges[0] == edges[1]


@quick
@given(
    days,
    st.booleans(),
    st.integers(1, 3),
    st.none() | st.integers(1, 2),
    st.none() | st.integers(2, 6),
    st.sampled_from(["recency", "frequency"]),
)
def test_numbers_of_a_chain(
    tmp_path_factory: pytest.TempPathFactory,
    days: list[Any],
    text: bool,
    min_count: int,
    unseen_days: int | None,
    rows: int | None,
    by: Any,
) -> None:
    folder = tmp_path_factory.mktemp("chain")
    evict = {"unseen_days": unseen_days, "rows": rows, "by": by}
    model, before = Model(min_count, Eviction.model_validate(evict)), None
    for day, (events, shown, brands) in enumerate(days):
        if day == 0 and brands is None:
            brands = {1: "p"}
        values = write_day(folder, day, events, shown, text)
        if brands is not None:
            write_brands(folder / f"brands{day}.parquet", brands, text)
        chosen = first_settings(
            values, folder / f"brands{day}.parquet", text, items={"min_count": min_count, "evict": evict}
        )
        if day == 0:
            prepare(PrepareSettings.model_validate(chosen), folder / "day0")
        else:
            # A file that is not named says nothing new.
            more = {} if brands is None else {"features": chosen["features"]}
            extend(folder / f"day{day - 1}", folder / f"day{day}", values, **more)
        model.add(day, events, shown, brands)
        written = Written(folder / f"day{day}")
        check(written, model, day, before)
        before = written


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(line, min_size=1, max_size=8), min_size=2, max_size=8),
    st.integers(1, 3),
    st.none() | st.integers(1, 3),
    st.none() | st.integers(1, 5),
    st.sampled_from(["recency", "frequency"]),
)
def test_rows_are_given_taken_and_given_again(
    days: list[list[Row]], min_count: int, unseen_days: int | None, rows: int | None, by: Any
) -> None:
    eviction = Eviction.model_validate({"unseen_days": unseen_days, "rows": rows, "by": by})
    model, former = Model(min_count, eviction), ItemRows(np.zeros(0, np.int32), np.zeros(0, np.int32), 0)
    ids: dict[int, int] = {}
    for day, events in enumerate(days):
        model.add(day, events, [], None)
        seen = {row["item"] for row in events}
        for item in sorted(seen - ids.keys()):
            ids[item] = len(ids) + 1
        model.give_rows(day, seen, ids)
        grown = len(ids) - len(former.row_I)
        former = assign_rows(
            former._replace(row_I=np.pad(former.row_I, (0, grown)), day_I=np.pad(former.day_I, (0, grown))),
            wanted_I=np.array([item in seen and model.frequency[item] >= min_count for item in ids]),
            frequency_I=np.array([model.frequency[item] for item in ids]),
            last_seen_I=np.array([model.last_seen[item] for item in ids]),
            now=max(row["time"] for row in model.lines),
            day=day,
            eviction=eviction,
        )
        pairs = zip(ids, zip(former.row_I.tolist(), former.day_I.tolist(), strict=True), strict=True)
        assert {item: of_item for item, of_item in pairs if of_item[0]} == model.row
        assert (former.largest, former.evicted) == (model.largest, model.evicted)
        assert rows is None or len(model.row) <= rows


@pytest.mark.spark
@pytest.mark.parametrize("text", [False, True])
def test_engines_write_the_same_days(tmp_path: Path, text: bool) -> None:
    random = np.random.default_rng(1)

    def rows(count: int) -> list[Row]:
        tags = [["x", "y"], ["z"], []]
        return [
            {"user": int(a), "item": int(b), "time": int(c), "shelf": "abc"[b % 3], "kind": ["view", None][a % 2]}
            | {"tags": tags[c % 3], "price": float(b % 4), "click": bool(c % 2)}
            for a, b, c in zip(*random.integers(1, [[9], [30], [DAY]], (3, count)), strict=True)
        ]

    for day in range(2):
        values = write_day(tmp_path, day, rows(200), rows(50), text)
        write_brands(tmp_path / f"brands{day}.parquet", {item: "pqr"[(item + day) % 3] for item in range(1, 20)}, text)
        chosen = first_settings(
            values, tmp_path / f"brands{day}.parquet", text, items={"min_count": 3, "evict": {"rows": 12}}
        )
        for engine in ("duckdb", "spark"):
            out = tmp_path / f"{engine}{day}"
            if day == 0:
                prepare(PrepareSettings.model_validate(chosen | {"engine": engine}), out)
            else:
                former = tmp_path / f"{engine}{day - 1}"
                extend(former, out, values | {"engine": engine}, features=chosen["features"])
                # The day's impressions alone, which are scored.
                shown = {"impressions": values["impressions"], "engine": engine}
                extend(former, tmp_path / f"{engine}{day + 1}", shown)
    for number in range(3):
        files = {path.name: path.read_bytes() for path in sorted((tmp_path / f"duckdb{number}").iterdir())}
        assert files == {path.name: path.read_bytes() for path in sorted((tmp_path / f"spark{number}").iterdir())}
