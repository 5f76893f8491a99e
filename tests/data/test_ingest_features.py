"""Features of every side and kind, as ``prepare`` writes them, against a slow reference in plain Python."""

import filecmp
import json
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pipeline.hashing import hash_texts, mix
from pipeline.ingest.prepare import prepare
from schemas.manifest import Manifest
from schemas.prepare import PrepareSettings
from schemas.shards import ITEM_FEATURES
from tests.examples import examples

Row = dict[str, Any]

FEATURES: list[dict[str, Any]] = [
    {"name": "tags", "of": "item", "kind": "ids", "column": "tags", "min_count": 3},
    {"name": "tags_hashed", "of": "item", "kind": "ids", "column": "tags", "hash_buckets": 2},
    {"name": "price", "of": "item", "kind": "number", "column": "price", "buckets": 3},
    {"name": "brand", "of": "item", "column": "brand", "file": "items.parquet"},
    {"name": "kind", "of": "behavior", "column": "kind", "min_count": 2},
    {"name": "dwell", "of": "behavior", "kind": "number", "column": "price", "scale": "log"},
    {"name": "place", "of": "behavior", "column": "place", "impression_column": "where"},
    {"name": "age", "of": "user", "column": "age"},
    {"name": "income", "of": "user", "kind": "number", "column": "income", "file": "users.csv", "scale": "standard"},
    {"name": "query", "of": "impression", "kind": "ids", "column": "query", "separator": " "},
    {"name": "slot", "of": "impression", "column": "slot", "type": "integer", "hash_buckets": 3},
]
WORDS = ["", "a", "b", "a b", "é\x1f", "\x1e0"]

rows = st.lists(
    st.fixed_dictionaries(
        {
            "user": st.sampled_from(["u", "v", "w\n"]),
            "item": st.sampled_from(["i", "j", "k", "l"]),
            "time": st.integers(0, 20),
            "tags": st.one_of(st.none(), st.lists(st.sampled_from(["x", "y", "z", "\x1f"]), max_size=3)),
            "price": st.one_of(st.none(), st.sampled_from([0.0, 0.5, 2.5, 1e9, math.nan])),
            "kind": st.sampled_from([None, "click", "buy", "cart"]),
            "place": st.sampled_from([None, "home", "mail"]),
            "where": st.sampled_from([None, "home", "list"]),
            "age": st.sampled_from([None, "old", "young"]),
            "query": st.sampled_from(WORDS),
            "slot": st.sampled_from([None, 0, 1, 2, 3, 4]),
            "click": st.booleans(),
            "buy": st.booleans(),
            "weight": st.sampled_from([0.0, 0.5, 3.0]),
        }
    ),
    min_size=2,
    max_size=40,
).filter(lambda rows: any(row["weight"] > 0 for row in rows))  # others are refused
quick = settings(
    max_examples=examples(4, 30), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

TYPES = pa.schema(
    {
        **dict.fromkeys(("user", "item", "kind", "place", "where", "age", "query"), pa.string()),
        **dict.fromkeys(("time", "slot"), pa.int64()),
        **dict.fromkeys(("price", "weight"), pa.float64()),
        **dict.fromkeys(("click", "buy"), pa.bool_()),
        "tags": pa.list_(pa.string()),
    }
)


def write(folder: Path, events: list[Row], shown: list[Row], parts: int = 1) -> None:
    for name, lines in (("events", events), ("shown", shown)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file in (folder / name).iterdir():
            file.unlink()
        for part in range(parts):
            pq.write_table(pa.Table.from_pylist(lines[part::parts], TYPES), folder / name / f"{part}.parquet")
    # An item and a user that are in no log; a user twice.
    pq.write_table(pa.table({"item": ["i", "j", "i", "no"], "brand": ["A", "B", "C", "D"]}), folder / "items.parquet")
    (folder / "users.csv").write_text("user,income\nu,5\nv,7.5\nu,5\nv,2\nnobody,1e30\n")


def chosen(folder: Path, **more: Any) -> PrepareSettings:
    names = {"user_id": "user", "item_id": "item", "timestamp": "time", "category_id": None}
    log = names | {"user_type": "text", "item_type": "text"}
    features = [each | ({"file": str(folder / each["file"])} if "file" in each else {}) for each in FEATURES]
    labels = {"labels": {"click": "click", "buy": "buy"}, "weight": "weight"}
    return PrepareSettings.model_validate(
        {
            "events": {"files": [str(folder / "events")]} | log,
            "impressions": {"files": [str(folder / "shown")]} | labels | log,
            "split": {"kind": "impressions", "min_history": 0},
            "features": features,
            "items": {"min_count": 2},
        }
        | more
    )


def last_value(lines: list[Row], key: str, of: str, column: str, clean: Callable[[Any], Any]) -> Any:
    """The last of the values that are there; of equal times the largest."""
    there = [(row["time"], clean(row[column])) for row in lines if row[key] == of and clean(row[column]) is not None]
    return max(there)[1] if there else None


def number(value: Any) -> Any:
    return None if value is None or math.isnan(value) else value


def text(value: Any) -> Any:
    return value or None


def set_of(value: Any) -> Any:
    values = value.split(" ") if isinstance(value, str) else value or []
    return tuple(sorted({each for each in values if each})) or None


class DataSet:
    """What was written, with raw values in the place of ids."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, Manifest.read(folder)
        self.manifest.verify(folder)
        self.records = {each.name: each for each in self.manifest.features}
        items = pq.read_table(folder / "items.parquet").to_pylist()
        self.item = {row["id"]: row["raw_id"] for row in items}
        self.frequency = {row["raw_id"]: row["frequency"] for row in items}
        with pa.ipc.open_file(str(folder / ITEM_FEATURES)) as file:
            table = file.read_all()
        self.bags = {name: self._bags(name) for name, each in self.records.items() if each.kind == "ids"}
        self.names = {name: self._names(name) for name, each in self.records.items() if each.dictionary}
        assert all(values[0] == 0 for values in table.to_pydict().values())
        self.of_item = {
            name: {self.item[id]: self.raw(name, values[id]) for id in self.item}
            for name, values in table.to_pydict().items()
        }
        self.users = {}
        for shard in self.manifest.shards:
            table = pq.read_table(folder / shard.path)
            assert table.schema.equals(self.manifest.shard_schema)
            self.users |= {row["user_id"]: row for row in table.to_pylist()}

    def raw(self, name: str, value: Any) -> Any:
        """A raw value (of a set all of them), None for the unknown; buckets and numbers as they are."""
        record = self.records[name]
        if record.kind == "ids":
            bags = self.bags[name]
            if record.dictionary is None:
                return tuple(bags[value])
            return tuple(sorted(self.names[name][id] for id in bags[value])) or None
        if record.dictionary is None:
            return value
        return self.names[name].get(value)

    def _bags(self, name: str) -> list[list[int]]:
        record = self.records[name]
        with pa.ipc.open_file(str(self.folder / str(record.bag_file))) as file:
            bags: list[list[int]] = file.read_all()["ids"].to_pylist()
        assert bags[0] == []
        assert len(bags) == 1 + (record.bags or 0)
        assert len({tuple(bag) for bag in bags}) == len(bags)
        assert all(bag == sorted(set(bag)) for bag in bags)
        return bags

    def _names(self, name: str) -> dict[int, Any]:
        record = self.records[name]
        dictionary = pq.read_table(self.folder / str(record.dictionary)).to_pylist()
        assert sorted(row["id"] for row in dictionary) == list(range(1, record.rows + 1))
        return {row["id"]: row["raw_id"] for row in dictionary}


def hashes_of(value: Any) -> str | None:
    whole = sorted(int(hash_texts(pa.array([each]))[0]) >> 1 for each in set_of(value) or ())
    return "\x1f".join(map(str, whole)) or None


def bucket_of(value: float | None, values: list[float], buckets: int) -> int:
    """The quantile of a value, counted without a search."""
    if value is None:
        return 0
    ranked = sorted(values)
    edges = {ranked[len(ranked) * k // buckets] for k in range(1, buckets)} - {ranked[0]}
    return 1 + sum(edge <= value for edge in edges)


def scaled(value: float | None, values: list[float], change: Callable[[float], float]) -> float:
    if value is None:
        return 0.0
    changed = [change(each) for each in values]
    mean = math.fsum(changed) / len(changed)
    deviation = math.sqrt(math.fsum((each - mean) ** 2 for each in changed) / len(changed))
    return (change(value) - mean) / (deviation or 1.0)


def hashed(value: Any, buckets: int) -> int:
    whole = hash_texts(pa.array([value])) if isinstance(value, str) else mix(pa.array([value]).to_numpy(), 0)
    return 1 + (int(whole[0]) >> 1) % buckets


# Weights that are all 0 are refused.
@quick
@given(rows, rows.filter(lambda shown: any(row["weight"] > 0 for row in shown)))
def test_every_side_and_kind(tmp_path: Path, events: list[Row], shown: list[Row]) -> None:
    assume(any(row["weight"] for row in shown))
    write(tmp_path, events, shown)
    prepare(chosen(tmp_path), tmp_path / "out", overwrite=True)
    data = DataSet(tmp_path / "out")
    both = [*events, *shown]
    items = {row["item"] for row in both}
    often = Counter(row["item"] for row in events)

    # Items: their ids, those that are rare, and what belongs to them.
    assert data.frequency == {item: often[item] for item in items}
    rare = {item for item in items if often[item] < 2}
    assert {data.item[id] for id in data.item if id > data.manifest.largest_item} == rare
    assert data.manifest.counts.items_below_min_count == len(rare)
    tags = {item: last_value(both, "item", item, "tags", set_of) for item in items}
    of_tag = Counter[str]()
    for item, values in tags.items():
        of_tag.update(dict.fromkeys(values or (), often[item]))
    known = {item: tuple(v for v in values or () if of_tag[v] >= 3) or None for item, values in tags.items()}
    assert data.of_item["tags"] == known
    record = data.records["tags"]
    assert (record.values, record.missing) == (len(items), list(tags.values()).count(None))
    assert record.below_min_count == sum(any(of_tag[v] < 3 for v in values or ()) for values in tags.values())
    assert record.rare == sum(n < 3 for n in of_tag.values())
    # Of equal times the largest hashes count, as texts: raw values are not there any more.
    hashes = {item: last_value(both, "item", item, "tags", hashes_of) for item in items}
    assert data.of_item["tags_hashed"] == {
        item: tuple(sorted({1 + int(each) % 2 for each in values.split("\x1f")} if values else ()))
        for item, values in hashes.items()
    }
    every = {each for row in both for each in set_of(row["tags"]) or ()}
    assert (data.records["tags_hashed"].collisions or 0) <= max(len(every) - 1, 0)
    price = {item: last_value(both, "item", item, "price", number) for item in items}
    prices = [value for value in price.values() if value is not None]
    assert data.of_item["price"] == {item: bucket_of(value, prices, 3) for item, value in price.items()}
    changed = {item: {number(row["price"]) for row in both if row["item"] == item} - {None} for item in items}
    assert data.records["price"].changed == sum(len(values) > 1 for values in changed.values())
    assert data.of_item["brand"] == {item: {"i": "C", "j": "B"}.get(item) for item in items}
    assert data.records["brand"].changed == ("i" in items)
    assert set(data.of_item["category"].values()) == {None}

    # Users, behaviours and impressions.
    users = {row["user"] for row in both}
    incomes = [{"u": 5.0, "v": 7.5}[user] for user in users if user in "uv"]
    of_kind = Counter(row["kind"] for row in events)
    dwells = [number(row["price"]) for row in events if number(row["price"]) is not None]
    assert set(data.users) == {row["user"] for row in shown}
    for user, row in data.users.items():
        mine = sorted((each for each in events if each["user"] == user), key=lambda each: each["time"])
        assert data.raw("age", row["user_age"]) == last_value(both, "user", user, "age", text)
        income = {"u": 5.0, "v": 7.5}.get(user)
        assert row["user_income"] == pytest.approx(scaled(income, incomes, float), rel=1e-5, abs=1e-6)
        assert row["history_timestamp"] == [each["time"] for each in mine]
        behaviors = zip(
            row["history_timestamp"],
            [data.item[id] for id in row["history_item"]],
            [data.raw("kind", id) for id in row["history_kind"]],
            [data.raw("place", id) for id in row["history_place"]],
            [round(value, 4) for value in row["history_dwell"]],
            strict=True,
        )
        assert Counter(behaviors) == Counter(
            (
                each["time"],
                each["item"],
                each["kind"] if of_kind[each["kind"]] >= 2 else None,
                each["place"],
                round(scaled(number(each["price"]), dwells, math.log1p), 4),
            )
            for each in mine
        )
        targets = zip(
            row["target_timestamp"],
            [data.item[id] for id in row["target_item"]],
            row["target_label"],
            row["target_label_buy"],
            row["target_weight"],
            [data.raw("place", id) for id in row["target_place"]],
            [data.raw("query", id) for id in row["target_query"]],
            row["target_slot"],
            strict=True,
        )
        assert Counter(targets) == Counter(
            (
                each["time"],
                each["item"],
                each["click"],
                each["buy"],
                each["weight"],
                each["where"],
                set_of(each["query"]),
                0 if each["slot"] is None else hashed(each["slot"], 3),
            )
            for each in shown
            if each["user"] == user
        )
    record = data.records["place"]
    assert (record.values, record.target) == (len(both), True)
    assert record.missing == sum(row["place"] is None for row in events) + sum(row["where"] is None for row in shown)
    slots = {row["slot"] for row in shown} - {None}
    assert data.records["slot"].collisions == len(slots) - len({hashed(slot, 3) for slot in slots})


def some_rows(count: int, seed: int) -> list[Row]:
    draw = random.Random(seed)
    return [
        {
            "user": f"user {draw.randrange(9)}",
            "item": f"item {draw.randrange(60)}",
            "time": draw.randrange(40),
            "tags": draw.choice([None, [], ["x"], ["y", "x"], ["z", "x"]]),
            "price": draw.choice([None, math.nan, draw.random() * 100]),
            "kind": draw.choice([None, "click", "buy"]),
            "place": draw.choice([None, "home", "mail"]),
            "where": draw.choice([None, "home", "list"]),
            "age": draw.choice([None, "old", "young"]),
            "query": draw.choice(WORDS),
            "slot": draw.randrange(5),
            "click": draw.random() < 0.5,
            "buy": draw.random() < 0.5,
            "weight": draw.random(),
        }
        for _ in range(count)
    ]


def same_files(one: Path, other: Path) -> None:
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in other.iterdir())
    different = [name for name in names if not filecmp.cmp(one / name, other / name, shallow=False)]
    # The manifest says which files the input was.
    assert set(different) <= {"manifest.json"}


def unnumbered(settings: PrepareSettings) -> PrepareSettings:
    """As targets are cut from events: numbers of lines, which say where impressions stood, are not there."""
    features = tuple(
        each.model_copy(update={"impression_column": each.impression_column and each.column})
        for each in settings.features
        if each.of != "impression"
    )
    content = settings.model_dump() | {"impressions": None, "features": features}
    content["split"] = {"kind": "paper", "min_behaviors": 5, "negatives": 1}
    return PrepareSettings.model_validate(content)


def test_order_files_and_threads_do_not_matter(tmp_path: Path) -> None:
    events = some_rows(900, 1)
    layout = {"shards": {"behaviors_per_shard": 300, "users_per_row_group": 2}}
    write(tmp_path, events, events[:5])
    prepare(unnumbered(chosen(tmp_path, threads=1, **layout)), tmp_path / "one")
    assert len(Manifest.read(tmp_path / "one").shards) > 1
    write(tmp_path, random.Random(3).sample(events, len(events)), events[:5], parts=4)
    shuffled = chosen(tmp_path, threads=3, **layout)
    prepare(unnumbered(shuffled.model_copy(update={"features": shuffled.features[::-1]})), tmp_path / "other")
    same_files(tmp_path / "one", tmp_path / "other")
    row = pq.read_table(tmp_path / "one" / Manifest.read(tmp_path / "one").shards[0].path).to_pylist()[0]
    # A target that was cut from an event has the event's own value, and so have its negatives.
    positive = row["target_history_end"][0], row["target_timestamp"][0]
    assert row["history_timestamp"][positive[0]] == positive[1]
    assert row["target_place"][::2] == row["target_place"][1::2]


@pytest.mark.spark
def test_engines_agree(tmp_path: Path) -> None:
    write(tmp_path, some_rows(500, 4), some_rows(200, 5), parts=2)
    for name, more in (("numbered", {}), ("hashed", {"items": {"hash_buckets": 40}})):
        prepare(chosen(tmp_path, **more), tmp_path / name)
        prepare(chosen(tmp_path, engine="spark", **more), tmp_path / f"{name}-spark")
        same_files(tmp_path / name, tmp_path / f"{name}-spark")
        manifests = [(tmp_path / each / "manifest.json").read_bytes() for each in (name, f"{name}-spark")]
        assert manifests[0] == manifests[1]


def test_hashed_items(tmp_path: Path) -> None:
    events, shown = some_rows(400, 6), some_rows(100, 7)
    write(tmp_path, events, shown)
    manifest = prepare(chosen(tmp_path, items={"hash_buckets": 40}), tmp_path / "out")
    items = {row["item"] for row in [*events, *shown]}
    occupied = {hashed(item, 40) for item in items}
    assert (manifest.counts.items, manifest.largest_item) == (40, 40)
    assert manifest.counts.items_collided == len(items) - len(occupied)
    dictionary = pq.read_table(tmp_path / "out" / "items.parquet").to_pylist()
    often = Counter(hashed(row["item"], 40) for row in events)
    assert {row["id"]: (row["raw_id"], row["frequency"]) for row in dictionary} == {
        bucket: (None, often[bucket]) for bucket in occupied
    }
    for shard in manifest.shards:
        for row in pq.read_table(tmp_path / "out" / shard.path).to_pylist():
            mine = [each for each in events if each["user"] == row["user_id"]]
            assert Counter(row["history_item"]) == Counter(hashed(each["item"], 40) for each in mine)
            wanted = Counter(hashed(each["item"], 40) for each in shown if each["user"] == row["user_id"])
            assert Counter(row["target_item"]) == wanted


def test_users_whose_keys_collide_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All texts have one hash: what is left to tell users apart are the texts themselves."""
    monkeypatch.setattr("pipeline.hashing.hash_texts", lambda values: mix(pa.array([0] * len(values)).to_numpy(), 0))
    events, shown = some_rows(300, 8), some_rows(100, 9)
    write(tmp_path, events, shown)
    manifest = prepare(chosen(tmp_path), tmp_path / "out")
    read = [row for shard in manifest.shards for row in pq.read_table(tmp_path / "out" / shard.path).to_pylist()]
    assert sorted(row["user_id"] for row in read) == sorted({row["user"] for row in shown})
    for row in read:
        assert len(row["history_item"]) == sum(each["user"] == row["user_id"] for each in events)


def test_quantiles_of_few_values_and_of_none(tmp_path: Path) -> None:
    events = [
        row | {"price": price} for row, price in zip(some_rows(6, 1), [2.0, 2.0, 2.0, 2.0, 3.0, None], strict=True)
    ]
    write(tmp_path, events, events)
    one = {"name": "price", "of": "behavior", "kind": "number", "column": "price"}
    none = {"name": "none", "of": "behavior", "kind": "number", "column": "weight"}
    for row in events:
        row["weight"] = math.nan
    write(tmp_path, events, [row | {"weight": 1.0} for row in events])
    features = [one | {"buckets": 10}, none | {"buckets": 4}, none | {"name": "level", "scale": "standard"}]
    manifest = prepare(chosen(tmp_path, features=features, items={}), tmp_path / "out")
    records = {each.name: each for each in manifest.features}
    assert (records["price"].edges, records["price"].rows) == ((3.0,), 2)
    assert (records["none"].edges, records["none"].missing) == ((), 6)
    assert (records["level"].mean, records["level"].deviation) == (0.0, 1.0)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["schema_version"] == 4
