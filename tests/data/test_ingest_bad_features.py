"""Bad input about features, labels and ids: one line that says what, where and what to do; odd input that works."""

import json
import logging
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from jobs.cli import main
from pipeline.ingest.prepare import prepare
from schemas.errors import UserError
from schemas.manifest import Manifest
from schemas.prepare import PrepareSettings

LINES = 6
GOOD: dict[str, Any] = {
    "user_id": [1, 1, 1, 2, 2, 2],
    "item_id": [5, 6, 7, 5, 6, 7],
    "timestamp": [1, 2, 3, 1, 2, 3],
    "word": ["a", "b", "a", "c", "a", "b"],
    "number": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    "list": [["x"], ["y"], [], ["x", "y"], None, ["z"]],
    "clicked": [0, 1, 0, 1, 0, 1],
    "weight": [1.0] * LINES,
}


def prepared(folder: Path, features: list[dict[str, Any]], *, shown: bool = False, **more: Any) -> Manifest:
    """Prepare what stands in the folder's events.* (and as impressions the same lines)."""
    (file,) = folder.glob("events.*")
    content: dict[str, Any] = {
        "events": {"files": [str(file)], "category_id": None} | more.pop("events", {}),
        "split": {"kind": "paper", "min_behaviors": 1, "negatives": 0},
        "features": features,
    }
    if shown:
        impressions = more.pop("impressions", {})
        label = {} if "labels" in impressions else {"label": "clicked"}
        content["impressions"] = {"files": [str(file)], "category_id": None} | label | impressions
        content["split"] = {"kind": "impressions", "min_history": 0}
    settings = PrepareSettings.model_validate(content | more)
    return prepare(settings, folder / "out", overwrite=True)


def write(folder: Path, **columns: Any) -> None:
    pq.write_table(pa.table(GOOD | columns), folder / "events.parquet")


def feature(**more: Any) -> dict[str, Any]:
    return {"name": "mine", "of": "behavior", "column": "word"} | more


@pytest.mark.parametrize(
    ("columns", "declared", "message"),
    [
        ({}, feature(column="nothing"), "events.parquet: no column nothing; it has user_id, item_id"),
        ({}, feature(of="item", column="nothing"), "events.parquet: no column nothing; it has user_id, item_id"),
        ({}, feature(column="list"), "is of the type list<element: string>, which cannot be read as texts; declare"),
        ({}, feature(column="list", kind="number", buckets=2), "is of the type list<element: string>, which cannot be"),
        ({}, feature(kind="ids"), "column word is of the type string, which cannot be read as lists of texts; set the"),
        ({}, feature(column="number"), "column number is of the type double, which cannot be read as texts"),
        ({}, feature(type="integer"), "row 1: column word: 'a' is not an integer; correct the file, or declare the fe"),
        ({}, feature(kind="number", scale="log"), "row 1: column word: 'a' is not a number"),
        (
            {"number": [1.0, 2.0, float("inf"), 4.0, 5.0, 6.0]},
            feature(column="number", kind="number", buckets=2),
            "row 3: column number: inf is infinite, or too large for a float32",
        ),
        (
            {"number": [1.0, -2.0, 3.0, 4.0, 5.0, 6.0]},
            feature(column="number", kind="number", scale="log"),
            "row 2: column number: -2.0 is negative; scale=log is for numbers of 0 or more",
        ),
        (
            {"list": [["1"], ["2", "x"], [], None, ["3"], []]},
            feature(column="list", kind="ids", type="integer"),
            "row 2: column list: 'x' is not an integer",
        ),
        (
            {"word": ["a", "b", "x" * (1 << 16) + "y", "c", "a", "b"]},
            feature(),
            "row 3: column word: 'xxxxx",
        ),
    ],
)
def test_refused(tmp_path: Path, columns: dict[str, Any], declared: dict[str, Any], message: str) -> None:
    write(tmp_path, **columns)
    with pytest.raises(UserError) as error:
        prepared(tmp_path, [declared])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["events.parquet"]


@pytest.mark.parametrize(
    ("columns", "impressions", "message"),
    [
        ({"clicked": [0, 1, 2, 0, 1, 0]}, {}, "row 3: column clicked: 2 is no label; labels are 0 or 1"),
        ({"clicked": [0, 1, None, 0, 1, 0]}, {}, "impressions: 1 of 6 lines in"),
        (
            {"word": ["0", "1", "1", "0", "0.5", "1"]},
            {"labels": {"click": "clicked", "buy": "word"}},
            "row 5: column word: '0.5' is no label",
        ),
        (
            {"weight": [1.0, 1.0, -0.5, 1.0, 1.0, 1.0]},
            {"weight": "weight"},
            "row 3: column weight: -0.5 is negative; weights are 0 or more",
        ),
        ({"weight": [1.0, float("nan"), 1.0, 1.0, 1.0, 1.0]}, {"weight": "weight"}, "have no weight; correct"),
        ({"weight": [1.0, 1e-300, 1.0, 1.0, 1.0, 1.0]}, {"weight": "weight"}, "have a weight above 0 that is 0 as a"),
        ({"weight": [0.0] * LINES}, {"weight": "weight"}, "are 0: nothing would be learnt; leave impressions.weight"),
        ({"clicked": [0, 1, None, 0, 1, 0]}, {}, "have no clicked; correct or remove them"),
        ({}, {"weight": "wait"}, "no column wait; it has"),
        ({}, {"labels": {"click": "clicked", "buy": "bought"}}, "no column bought; it has"),
    ],
)
def test_labels_and_weights(tmp_path: Path, columns: dict[str, Any], impressions: dict[str, Any], message: str) -> None:
    write(tmp_path, **columns)
    log: dict[str, Any] = {"files": [str(tmp_path / "events.parquet")], "category_id": None}
    label = {} if "labels" in impressions else {"label": "clicked"}
    content = {"events": log, "impressions": log | label | impressions, "split": {"kind": "impressions"}}
    with pytest.raises(UserError) as error:
        prepare(PrepareSettings.model_validate(content), tmp_path / "out")
    assert message in str(error.value)


def test_further_labels_may_be_unknown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, bought=[None, 1, None, 0, None, 1])
    with caplog.at_level("INFO", "dare.data"):
        manifest = prepared(tmp_path, [], shown=True, impressions={"labels": {"click": "clicked", "buy": "bought"}})
    assert manifest.counts.impressions_unlabeled == {"buy": 3}
    assert "label buy: 3 impressions have none; a task learns from the others alone" in caplog.text
    rows = [row for shard in manifest.shards for row in pq.read_table(tmp_path / "out" / shard.path).to_pylist()]
    targets = sorted(pair for row in rows for pair in zip(row["target_line"], row["target_label_buy"], strict=True))
    assert [label for _, label in targets] == [-1, 1, -1, 0, -1, 1]


def test_a_text_file_has_no_lists(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("user_id,item_id,timestamp,tags\n1,5,1,a|b\n1,6,2,b|a|b\n1,7,3,|\n")
    declared = {"name": "tags", "of": "item", "kind": "ids", "column": "tags"}
    with pytest.raises(UserError, match="a text file has no lists, as column tags should; set the feature's separator"):
        prepared(tmp_path, [declared])
    manifest = prepared(tmp_path, [declared | {"separator": "|"}])
    (tags,) = (each for each in manifest.features if each.name == "tags")
    assert (tags.rows, tags.bags, tags.values, tags.missing) == (2, 1, 3, 1)


def test_a_file_with_a_user_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Equal lines are no conflict; of different values the largest counts, and a line says how many users have some."""
    write(tmp_path)
    declared = feature(of="user", column="age", file=str(tmp_path / "users.csv"), type="integer")
    logging.getLogger("dare").propagate = True
    for lines, changed, age in (("1,30\n1,30\n2,8\n", 0, "30"), ("1,9\n1,30\n1,10\n2,8\n", 1, "30")):
        (tmp_path / "users.csv").write_text("user_id,age\n" + lines)
        caplog.clear()
        with caplog.at_level(logging.INFO, "dare.data"):
            manifest = prepared(tmp_path, [declared])
        (record,) = manifest.features_of("user")
        assert record.changed == changed
        said = "feature mine: 1 users have several values in its file; the largest of each counts"
        assert (said in caplog.text) == bool(changed)
        raw = {row["id"]: row["raw_id"] for row in pq.read_table(tmp_path / "out/feature-mine.parquet").to_pylist()}
        row = pq.read_table(tmp_path / "out/shard-00000.parquet").to_pylist()
        assert {each["user_id"]: str(raw[each["user_mine"]]) for each in row} == {1: age, 2: "8"}
    (tmp_path / "users.csv").write_text("user,age\n1,30\n")
    with pytest.raises(UserError, match=r"users: .*users.csv: no column user_id; it has user, age"):
        prepared(tmp_path, [declared])


@pytest.mark.parametrize("items", [{}, {"hash_buckets": 4}])
def test_a_file_with_a_line_of_nobody(tmp_path: Path, items: dict[str, Any]) -> None:
    write(tmp_path)
    pq.write_table(pa.table({"key": [5, None, 7], "brand": ["a", "b", "c"]}), tmp_path / "items.parquet")
    declared = feature(of="item", column="brand", key="key", file=str(tmp_path / "items.parquet"))
    with pytest.raises(
        UserError, match=r"^items: 1 of 3 lines in .*items.parquet have no key; correct or remove them$"
    ):
        prepared(tmp_path, [declared], items=items)


@pytest.mark.parametrize("nothing", [pa.nulls(LINES), pa.array([[]] * LINES, pa.list_(pa.null()))])
def test_a_column_of_sets_without_any_value(tmp_path: Path, nothing: pa.Array) -> None:
    write(tmp_path, list=nothing)
    (record,) = prepared(tmp_path, [feature(column="list", kind="ids")]).features_of("behavior")
    assert (record.rows, record.bags, record.values, record.missing) == (0, 0, LINES, LINES)


def test_more_values_than_buckets_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path)
    logging.getLogger("dare").propagate = True
    with caplog.at_level(logging.INFO, "dare.data"):
        manifest = prepared(tmp_path, [feature(hash_buckets=2)], items={"hash_buckets": 1})
    (record,) = manifest.features_of("behavior")
    assert (record.rows, record.encoding) == (2, "hash")
    assert f"feature mine: {record.collisions} raw values share one of 2 buckets with another one" in caplog.text
    assert manifest.counts.items_collided == 2
    assert "items: 2 raw ids share one of 1 buckets with another one" in caplog.text


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ([feature(), feature()], "features: two are called mine"),
        ([feature(name="category")], "category is the name of what items have"),
        ([feature(of="impression")], "there are no impressions"),
        ([feature(kind="number")], "a number needs buckets or scale"),
        ([feature(impression_column="other")], "there are no impressions; it can only be word"),
    ],
)
def test_declarations(tmp_path: Path, declared: list[dict[str, Any]], message: str) -> None:
    write(tmp_path)
    with pytest.raises(ValidationError, match=message):
        prepared(tmp_path, declared)


def test_json_tells_of_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path)
    features = json.dumps([feature(min_count=2), feature(name="level", column="number", kind="number", buckets=2)])
    arguments = [
        "--events",
        tmp_path / "events.parquet",
        "--out",
        tmp_path / "out",
        "--json",
        "events.category_id=null",
    ]
    arguments += ["split.min_behaviors=1", "split.negatives=0", f"features={features}"]
    monkeypatch.setattr("sys.argv", ["dare", "prepare", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    assert not exit.value.code
    output = capsys.readouterr().out
    assert "feature mine of behavior: 2 ids; 6 places, 0 missing, 1 below min_count" in output
    told = json.loads(output.splitlines()[-1])
    assert told["features"] == {
        "category": {"of": "item", "kind": "id", "rows": 0, "missing": 3, "below_min_count": 0},
        "level": {"of": "behavior", "kind": "number", "rows": 2, "missing": 0, "below_min_count": 0},
        "mine": {"of": "behavior", "kind": "id", "rows": 2, "missing": 0, "below_min_count": 1},
    }
    assert (told["events_read"], told["events_kept"], told["events_left_out"]) == (LINES, LINES, {})


UUIDS = [str(uuid.UUID(int=number // 2 << 64)) for number in range(LINES)]
BYTES = pa.array([uuid.UUID(each).bytes for each in UUIDS], pa.binary(16))
IDS: dict[str, tuple[pa.Array, list[str]]] = {
    "string": (pa.array(["é", "é", "b", "c\x00", "b", "é"]), ["é", "é", "b", "c\x00", "b", "é"]),
    "large_string": (pa.array(list("aabbcd"), pa.large_string()), list("aabbcd")),
    "string_view": (pa.array(list("aabbcd"), pa.string_view()), list("aabbcd")),
    "dictionary": (pa.array(list("aabbcd")).dictionary_encode(), list("aabbcd")),
    "fixed": (BYTES, UUIDS),
    "uuid": (
        pa.ExtensionArray.from_storage(pa.uuid(), pa.array([uuid.UUID(u).bytes for u in UUIDS], pa.binary(16))),
        UUIDS,
    ),
    "bytes": (pa.array([b"\x00\xff", b"\x01"] * 3), ["00ff", "01"] * 3),
    "integers": (pa.array([2**63, 7, 7, 8, 9, 7], pa.uint64()), [str(2**63), "7", "7", "8", "9", "7"]),
}


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("side", ["user", "item"])
def test_ids_of_any_type(tmp_path: Path, kind: str, side: str) -> None:
    values, texts = IDS[kind]
    write(tmp_path, **{f"{side}_id": values})
    manifest = prepared(tmp_path, [feature()], events={f"{side}_type": "text"})
    assert (manifest.user_type, manifest.item_type)[side == "item"] == "text"
    items = {row["id"]: row["raw_id"] for row in pq.read_table(tmp_path / "out/items.parquet").to_pylist()}
    seen = [
        (row["user_id"], items[item], time)
        for shard in manifest.shards
        for row in pq.read_table(tmp_path / "out" / shard.path).to_pylist()
        for item, time in zip(row["history_item"], row["history_timestamp"], strict=True)
    ]
    raw = {"user": GOOD["user_id"], "item": GOOD["item_id"]} | {side: texts}
    wanted = list(zip(raw["user"], raw["item"], GOOD["timestamp"], strict=True))
    # Users without a target are left out: those whose events are all of one moment.
    users = {user for user, *_ in seen}
    assert sorted(seen) == sorted(line for line in wanted if line[0] in users)
    assert users == {user for user in raw["user"] if len({t for u, _, t in wanted if u == user}) > 1}


def test_each_column_has_its_own_kind(tmp_path: Path) -> None:
    """Both logs must agree, a file's key is read as the log's ids are, and integers stay integers."""
    write(tmp_path, user_id=["1", "1", "01", "2", "2", "01"])
    with pytest.raises(UserError, match=r"column user_id: '01' is not an integer.*events.user_type=text if ids are"):
        prepared(tmp_path, [])
    with pytest.raises(ValidationError, match=r"impressions.user_type and events.user_type must agree"):
        prepared(tmp_path, [], shown=True, events={"user_type": "text"})
    text = {"user_type": "text"}
    pq.write_table(pa.table({"user_id": ["01", "1"], "age": [5, 6]}), tmp_path / "users.parquet")
    age = {"name": "age", "of": "user", "column": "age", "type": "integer", "file": str(tmp_path / "users.parquet")}
    manifest = prepared(tmp_path, [age], shown=True, events=text, impressions=text)
    assert pq.read_schema(tmp_path / "out/feature-age.parquet").field("raw_id").type == pa.int64()
    raw = {row["id"]: row["raw_id"] for row in pq.read_table(tmp_path / "out/feature-age.parquet").to_pylist()}
    rows = pq.read_table(tmp_path / "out" / manifest.shards[0].path).to_pylist()
    assert {row["user_id"]: raw.get(row["user_age"]) for row in rows} == {"01": 5, "1": 6, "2": None}
