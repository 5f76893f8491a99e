"""`dare prepare --dictionaries`: ids, encodings and items of another data set, to which nothing is added."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.ingest.chain import Base
from pipeline.ingest.prepare import prepare
from pipeline.stream.data_set import DataSet
from pipeline.stream.translation import Translation
from schemas.errors import UserError
from schemas.manifest import MANIFEST, Manifest
from schemas.prepare import PrepareSettings
from schemas.shards import ITEM_FEATURES
from tests.data.test_extend import first_settings, write_brands, write_day
from tests.datasets import manifest_of, write_manifest

HERE = [
    # user, item, time, shelf, kind, tags, price, click
    (1, 1, 1, "a", "view", ["x", "y"], 1.0, True),
    (1, 2, 2, "a", "view", ["x"], 2.0, False),
    (2, 1, 3, "a", "cart", ["y"], 1.0, True),
    (2, 3, 4, "b", "cart", ["x", "y"], 30.0, True),
    (2, 3, 5, "b", "view", ["x", "y"], 30.0, False),
]
THERE = [
    (1, 1, 1, "b", "view", ["x", "z"], 30.0, True),
    (9, 7, 2, "a", "buy", ["y", "x"], 5.0, True),
    (9, 8, 3, "new", "cart", ["z"], None, False),
    (9, 7, 4, "a", "cart", ["y", "x"], 5.0, True),
]
COLUMNS = ("user", "item", "time", "shelf", "kind", "tags", "price", "click")


def rows(lines: list[Any]) -> list[dict[str, Any]]:
    return [dict(zip(COLUMNS, line, strict=True)) for line in lines]


def make(folder: Path, lines: list[Any], brands: dict[int, str], *, text: bool, keep: bool, **more: Any) -> Any:
    folder.mkdir()
    write_brands(folder / "brands.parquet", brands, text)
    files = write_day(folder, 0, rows(lines), rows(lines[-2:]), text)
    values = first_settings(files, folder / "brands.parquet", text, items={"min_count": 2}) | more
    if not keep:
        del values["history"]
    return values


def read(folder: Path) -> tuple[Manifest, dict[str, Any], dict[str, list[Any]], list[list[int]]]:
    manifest = Manifest.read(folder)
    manifest.verify(folder)
    items = {str(row["raw_id"]): row for row in pq.read_table(folder / "items.parquet").to_pylist()}
    with pa.ipc.open_file(str(folder / ITEM_FEATURES)) as file:
        features = file.read_all().to_pydict()
    with pa.ipc.open_file(str(folder / "bags-tags.arrow")) as file:
        return manifest, items, features, file.read_all()["ids"].to_pylist()


@pytest.mark.parametrize(("text", "keep", "version"), [(False, True, 4), (True, True, 4), (False, False, 3)])
def test_nothing_is_added(tmp_path: Path, text: bool, keep: bool, version: int) -> None:
    values = make(tmp_path / "a", HERE, {1: "p", 2: "q"}, text=text, keep=keep)
    prepare(PrepareSettings.model_validate(values), tmp_path / "d")
    if version == 3:
        # As an earlier version of the program has written it.
        kept = {
            key: value for key, value in manifest_of(tmp_path / "d").items() if key not in ("chain", "placed_items")
        }
        write_manifest(tmp_path / "d", kept | {"schema_version": 3})
    base = Base.open(tmp_path / "d", closed=True)
    values = make(tmp_path / "b", THERE, {1: "r", 7: "p", 8: "s"}, text=text, keep=False)
    prepare(PrepareSettings.model_validate(values), tmp_path / "e", base=base)
    (ours, items, features, bags), (theirs, known, of_known, known_bags) = read(tmp_path / "e"), read(tmp_path / "d")

    assert ours.dictionaries_of == base.fingerprint == DataSet.open(tmp_path / "d").fingerprint
    assert (ours.chain, ours.placed_items, ours.item_rows) == (None, keep, theirs.item_rows)
    for record in theirs.features:
        if record.dictionary is not None:
            assert (tmp_path / "e" / record.dictionary).read_bytes() == (
                tmp_path / "d" / record.dictionary
            ).read_bytes()
        same = {"rows", "edges", "mean", "deviation", "encoding", "target"}
        (own,) = [each for each in ours.features if each.name == record.name]
        assert own.model_dump(include=same) == record.model_dump(include=same)
    # Items: those that are known are what they were; others come behind, without a row.
    assert {raw: items[raw]["id"] for raw in known} == {raw: row["id"] for raw, row in known.items()}
    assert {raw: row["frequency"] for raw, row in items.items()} == {"1": 1, "2": 0, "3": 0, "7": 2, "8": 1}
    assert {items[raw]["id"] for raw in ("7", "8")} == {4, 5}
    for name, column in of_known.items():
        assert features[name][:4] == column
    assert bags[: len(known_bags)] == known_bags
    if keep:
        assert features["item"][4:] == [0, 0]
        assert items["7"]["row"] == items["8"]["row"] == 0
        assert ours.counts.items_below_min_count == sum(row["row"] == 0 for row in items.values())
    else:
        assert ours.counts.items_below_min_count == 5 - ours.largest_item
    # Their features are known, where the other data set knows the values.
    ids = {
        name: {
            row["raw_id"]: row["id"] for row in pq.read_table(tmp_path / "d" / f"feature-{name}.parquet").to_pylist()
        }
        for name in ("category", "tags", "brand")
    }
    seven, eight = items["7"]["id"], items["8"]["id"]
    assert [features["category"][item] for item in (seven, eight)] == [ids["category"]["a"], 0]
    assert [features["brand"][item] for item in (seven, eight)] == [ids["brand"]["p"], 0]
    assert bags[features["tags"][seven]] == sorted(ids["tags"][tag] for tag in ("x", "y"))
    assert bags[features["tags"][eight]] == []
    (category,) = ours.features_of("item")[1:2]
    assert (category.name, category.rare, category.below_min_count) == ("category", 1, 1)
    # A model of the other data set reads it as it would its own.
    translated = Translation.between(DataSet.open(tmp_path / "e"), DataSet.open(tmp_path / "d")).ids
    assert translated["category"].tolist() == list(range(theirs.counts.categories + 1))


def test_hashed_items(tmp_path: Path) -> None:
    values = make(tmp_path / "a", HERE, {1: "p"}, text=True, keep=True, items={"hash_buckets": 3})
    prepare(PrepareSettings.model_validate(values), tmp_path / "d")
    values = make(tmp_path / "b", THERE, {7: "p"}, text=True, keep=False, items={"hash_buckets": 3})
    ours = prepare(PrepareSettings.model_validate(values), tmp_path / "e", base=Base.open(tmp_path / "d", closed=True))
    assert (ours.counts.items, ours.item_rows, ours.counts.items_below_min_count) == (3, 3, 0)
    read(tmp_path / "e")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": {"hash_buckets": 3}}, "it has items.hash_buckets=null, here it is 3"),
        ({"history": {"keep": 10}}, "--dictionaries and history.keep"),
        (
            {"price": {"buckets": None, "scale": "log"}},
            "feature price has encoding=buckets, here it has encoding=scale",
        ),
        ({"tags": {"hash_buckets": 9}}, "feature tags has encoding=dictionary, here it has encoding=hash"),
        ({"brand": None}, "feature brand is declared there and not here"),
        ({"text": True}, "its items are integer, and events.item_type=text here"),
    ],
)
def test_other_features(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    values = make(tmp_path / "a", HERE, {1: "p"}, text=False, keep=False)
    prepare(PrepareSettings.model_validate(values), tmp_path / "d")
    values = make(tmp_path / "b", THERE, {7: "p"}, text=bool(change.pop("text", False)), keep=False)
    for name, different in list(change.items()):
        (feature,) = [each for each in values["features"] if each["name"] == name] or [None]
        if feature is not None:
            values["features"].remove(feature)
            change.pop(name)
            if different is not None:
                plain = {key: value for key, value in feature.items() if key != "min_count"}
                values["features"].append(plain | different)
    with pytest.raises(UserError, match=message):
        prepare(
            PrepareSettings.model_validate(values | change),
            tmp_path / "e",
            base=Base.open(tmp_path / "d", closed=True),
        )
    assert not (tmp_path / "e" / MANIFEST).exists()
