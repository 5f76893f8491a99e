"""`dare store`: logs of all kinds in a store, events by hand, and what is refused in a line."""

import contextlib
import io
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import lmdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import error_line
from pipeline.serve import load_log
from pipeline.serve.store import open_store
from schemas.errors import RequestError
from tests.data.conftest import Dare
from tests.launcher import start, wait
from tests.serve.stores import PlainStore

FEATURES = [
    {"name": "kind", "of": "behavior", "column": "what"},
    {"name": "price", "of": "behavior", "column": "price", "kind": "number", "scale": "log"},
    {"name": "tags", "of": "behavior", "column": "tags", "kind": "ids"},
    {"name": "words", "of": "behavior", "column": "words", "kind": "ids", "separator": "|"},
    {"name": "hour", "of": "behavior", "time": "hour"},
    {"name": "city", "of": "user", "column": "city"},
    {"name": "brand", "of": "item", "column": "brand"},
]
SETTINGS = {
    "events": {
        **{"user_id": "who", "user_type": "text", "item_id": "thing", "timestamp": "at", "timestamp_unit": "ms"},
        **{"category_id": None, "keep": {"what": ["view", "buy"]}},
    },
    "features": FEATURES,
}
NAMES = ("at", "thing", "what", "price", "tags", "words")


def lines(count: int, seed: int) -> list[dict[str, Any]]:
    """Lines of a log, some of which come twice, in no order."""
    draw = random.Random(seed)
    found = [
        {
            "who": f"ü{draw.randrange(5)}",
            "at": draw.randrange(40) * 1_000 + draw.randrange(3) * 7,
            "thing": draw.randrange(2**40),
            "what": draw.choice(["view", "buy", "bot"]),
            "price": draw.choice([None, 1.5, 0.1, 7.0]),
            "tags": draw.choice([None, ["b", "a", "b"], []]),
            "words": draw.choice([None, "x|y", "z"]),
            "city": draw.choice([None, "Rome", "Oslo"]),
            "brand": "acme",
        }
        for _ in range(count)
    ]
    found += draw.sample(found, count // 3)
    draw.shuffle(found)
    return found


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)
    return path


def contents(path: Path) -> dict[bytes, bytes]:
    """All that a store holds."""
    with lmdb.open(str(path), readonly=True) as environment, environment.begin() as transaction:
        return {bytes(key): bytes(content) for key, content in transaction.cursor()}


def plain(rows: list[dict[str, Any]], keep: int) -> PlainStore:
    """A log in a store of plain Python."""
    store = PlainStore(keep, 1_000)
    came: dict[str, list[Any]] = {}
    for row in rows:
        if row["what"] != "bot":
            tags = tuple(sorted(set(row["tags"]))) if row["tags"] else None
            came.setdefault(row["who"], []).append((*(row[name] for name in NAMES[:4]), tags, row["words"]))
    for user, events in came.items():
        store.add(user, events, repeats=True)
    return store


@pytest.mark.parametrize("keep", [6, 1_000])
def test_a_log_of_all_kinds(dare: Dare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int) -> None:
    (tmp_path / "log.yaml").write_text(json.dumps(SETTINGS))
    rows = lines(150, keep)
    log = write(tmp_path / "log.parquet", rows)
    options = ("--config", tmp_path / "log.yaml", "--keep", keep)
    code, told = dare("store", "load", "--store", tmp_path / "one", "--events", log, *options, "--json")
    assert code == 0
    expected = plain(rows, keep)
    kept = sum(len(expected.history(user)) for user in expected.came)
    bots = sum(row["what"] == "bot" for row in rows)
    counted = json.loads(told.splitlines()[-1])
    assert {name: counted[name] for name in ("read", "filtered", "new", "known", "not_kept", "users")} == {
        **{"read": len(rows), "filtered": bots, "new": kept, "known": 0},
        **{"not_kept": len(rows) - bots - kept, "users": len(expected.came)},
    }
    assert "not kept: older than the last" in told
    with open_store(str(tmp_path / "one"), read_only=True) as store:
        assert store.users() == sorted(expected.came)
        for user in expected.came:
            history = store.history(user)
            tags = [None if value is None else tuple(value) for value in history["tags"]]
            assert list(zip(*(tags if name == "tags" else history[name] for name in NAMES), strict=True)) == (
                expected.history(user)
            )
            cities = [(row["at"] // 1_000, row["city"]) for row in rows if row["who"] == user and row["what"] != "bot"]
            assert history["city"] == max(city for city in cities if city[1] is not None)[1]
    # The same log again, and in many parts: the same store.
    first = contents(tmp_path / "one")
    code, told = dare("store", "load", "--store", tmp_path / "one", "--events", log, *options)
    assert f"0 new, {kept:,} there already" in told
    assert contents(tmp_path / "one") == first
    monkeypatch.setattr(load_log, "_PART_BYTES", 1_000)
    monkeypatch.setattr(load_log, "_EVENTS", 20)
    assert dare("store", "load", "--store", tmp_path / "two", "--events", log, *options)[0] == 0
    assert contents(tmp_path / "two") == first
    with open_store(str(tmp_path / "two")) as store:
        # What is filtered may hold whatever it likes.
        bought = {
            "at": [1_000, 5_000, 1_000],
            "thing": [None, 2, 3],
            "what": ["bot", "buy", None],
            "tags": [[], ["a"], []],
            **{"price": [None, 2.5, 7], "words": [None] * 3},
        }
        appended = store.append("new", bought)
        assert (appended, appended.filtered) == (1, 2)
        assert store.history("new")["thing"] == [2]
        with pytest.raises(RequestError, match=r"events.thing\[1\] is missing; an event needs an item"):
            store.append("new", bought | {"thing": [1, None, 3]})
        with pytest.raises(RequestError, match="events: column what is missing"):
            store.append("new", {name: [None] for name in NAMES if name != "what"})


def test_what_files_say_of_users(dare: Dare, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,city,timestamp\n1,5,Rome,10\n1,6,,20\n2,7,Oslo,30\n")
    (tmp_path / "users.csv").write_text("user_id,city,age\n1,A,30\n3,C,50\n1,B,20\n2,,\n")
    features = [
        {"name": "town", "of": "user", "column": "city"},
        {"name": "origin", "of": "user", "column": "city", "file": "beside:users.csv"},
        {"name": "age", "of": "user", "column": "age", "kind": "number", "buckets": 2, "file": "beside:users.csv"},
    ]
    (tmp_path / "log.yaml").write_text(json.dumps({"events": {"category_id": None}, "features": features}))
    options = ("--events", tmp_path / "log.csv", "--config", tmp_path / "log.yaml")
    for _ in range(2):
        assert dare("store", "load", "--store", tmp_path / "store", *options)[0] == 0
        with open_store(str(tmp_path / "store")) as store:
            first = {"user_id": 1, "timestamp": [10, 20], "item_id": [5, 6]}
            # The name is that of two things; a request calls them so too.
            assert store.history(1) == first | {"user.town": "Rome", "user.origin": "B", "age": 30.0}
            assert store.history(2) == {"user_id": 2, "timestamp": [30], "item_id": [7], "user.town": "Oslo"}
            assert store.history(3) == {"user_id": 3, "timestamp": [], "item_id": [], "user.origin": "C", "age": 50.0}
    (tmp_path / "users.csv").write_text("user_id,city,age\n,A,30\n")
    code, message = dare("store", "load", "--store", tmp_path / "store", *options)
    assert (code, message.endswith("users.csv: lines have no user_id; correct or remove them")) == (1, True)


def test_a_text_log_has_the_histories_of_the_data_set_that_is_made_of_it(dare: Dare, tmp_path: Path) -> None:
    draw = random.Random(3)
    rows = [
        f"{draw.randrange(4)},{draw.randrange(30)},2,2024-05-{draw.randrange(10, 30)}T01:02:03+01:00" for _ in range(90)
    ]
    rows += rows[:5]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,category_id,timestamp", *rows]) + "\n")
    log, data = tmp_path / "log.csv", tmp_path / "data"
    settings = ("split.min_behaviors=1", "split.negatives=0", "events.timestamp_unit=datetime")
    assert dare("prepare", "--out", data, "--events", log, *settings)[0] == 0
    assert dare("store", "load", "--store", tmp_path / "store", "--events", log, "--data", data)[0] == 0
    prepared: dict[int, list[int]] = {}
    for shard in data.glob("shard-*.parquet"):
        for row in pq.read_table(shard).to_pylist():
            prepared[row["user_id"]] = row["history_timestamp"]
    with open_store(str(tmp_path / "store")) as store:
        assert store.users() == sorted(prepared)
        for user, seconds in prepared.items():
            history = store.history(user)
            assert list(history) == ["user_id", "timestamp", "item_id"]
            assert store.columns.events(history).moment.tolist() == seconds, "what a store gives it takes again"
        assert store.append(0, store.history(0)) == 0


def test_events_by_hand(dare: Dare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n1,5,10\n1,6,20\n2,7,30\n")
    store = ("--store", f"lmdb:{tmp_path / 'store'}")
    none = "events.category_id=null"
    assert dare("store", "load", *store, "--events", tmp_path / "log.csv", "--keep", 3, none)[0] == 0
    (tmp_path / "more.json").write_text('{"timestamp": [15, 20, 5], "item_id": [8, 6, 9]}')
    code, told = dare("store", "append", *store, "--user", 1, "--events", tmp_path / "more.json", "--json")
    assert (code, json.loads(told.splitlines()[-1])) == (0, {"new": 1, "known": 1, "not_kept": 1, "filtered": 0})
    assert told.startswith("user 1: 1 new, 1 there already, 0 filtered, 1 not kept: older than the last 3\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"timestamp": [40], "item_id": [1]}'))
    assert dare("store", "append", *store, "--user", 3, "--events", "-")[0] == 0
    code, told = dare("store", "show", *store, "--user", 1, "--json")
    assert code == 0
    assert json.loads(told.splitlines()[-1]) == {"user_id": 1, "timestamp": [10, 15, 20], "item_id": [5, 8, 6]}
    assert told.startswith("user 1: 3 events of at most 3; ")
    assert dare("store", "show", *store, "--user", 9)[1] == "user 9: 0 events of at most 3; 0 bytes\n"


def test_what_is_refused(dare: Dare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n1,5,10\n")
    (tmp_path / "faulty.csv").write_text("user_id,item_id,timestamp\n1,5,10\n1,x,10\n")
    (tmp_path / "null.csv").write_text("user_id,item_id,timestamp\n1,5,10\n,4,10\n")
    (tmp_path / "ms.csv").write_text("user_id,item_id,timestamp\n1,5,1700000000000000\n")
    store, none = ("--store", tmp_path / "store"), "events.category_id=null"

    def refused(*arguments: object) -> str:
        code, message = dare("store", *arguments)
        assert code == 1
        return message

    def load(name: str, *more: object) -> str:
        return refused("load", *store, "--events", tmp_path / name, none, *more)

    assert "faulty.csv, line 3: column item_id: 'x' is not an integer; correct the file" in load("faulty.csv")
    assert "null.csv have no user_id; correct or remove them" in load("null.csv")
    assert "set events.timestamp_unit=ms or us if they are not seconds" in load("ms.csv")
    assert "no column thing; it has user_id, item_id, timestamp" in load("log.csv", "events.item_id=thing")
    assert "--preset nothing: unknown" in load("log.csv", "--preset", "nothing")
    assert not (tmp_path / "store").exists()
    assert "--model, --data and --preset: each says" in load("log.csv", "--preset", "taobao", "--data", tmp_path)
    assert "not a data set" in load("log.csv", "--data", tmp_path)
    assert "no model.json: not an exported model" in load("log.csv", "--model", tmp_path)
    assert dare("store", "load", *store, "--events", tmp_path / "log.csv", none)[0] == 0
    assert "it has item=item_id, and user_id is wanted" in load("log.csv", "events.item_id=user_id")
    assert "keeps the last 10,000 events of a user, not 4" in load("log.csv", "--keep", 4)

    def append(text: str, user: object = 1) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return refused("append", *store, "--user", user, "--events", "-")

    assert "--events standard input: no JSON (Expecting value" in append("")
    assert "NaN is no number of JSON; null says" in append('{"timestamp": [NaN], "item_id": [1]}')
    assert "give an object, column -> list" in append("[1]")
    assert "events: column item_id is missing" in append('{"timestamp": [1]}')
    assert "user: 'x' is not an integer" in append("{}", "x")
    assert "no such file" in refused("append", *store, "--user", 1, "--events", tmp_path / "none.json")
    assert "there is no store of histories" in refused("show", "--store", tmp_path / "none", "--user", 1)
    assert "not a store of histories: a folder with other files" in refused("show", "--store", tmp_path, "--user", 1)


def test_no_space_left(dare: Dare, tmp_path: Path, small_disk: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"{n},5,{n}\n" for n in range(2_000)))
    store = ("--store", small_disk / "store")
    keep = ("--keep", 1_000_000, "events.category_id=null")
    assert dare("store", "load", *store, "--events", tmp_path / "log.csv", *keep)[0] == 0
    before = contents(small_disk / "store")
    (small_disk / "other").write_bytes(bytes(500_000))
    items = [number * 2**40 for number in range(60_000)]
    (tmp_path / "more.json").write_text(json.dumps({"timestamp": list(range(60_000)), "item_id": items}))
    code, message = dare("store", "append", *store, "--user", 1, "--events", tmp_path / "more.json")
    assert (code, message) == (1, f"dare: {small_disk / 'store'}: no space left")
    assert contents(small_disk / "store") == before, "nothing by half"
    (tmp_path / "more.json").write_text('{"timestamp": [7], "item_id": [7]}')
    assert dare("store", "append", *store, "--user", 1, "--events", tmp_path / "more.json")[0] == 0


def as_nobody(url: str, told: Path) -> None:
    os.setuid(65_534)
    with contextlib.suppress(PermissionError):
        told.unlink()
        raise AssertionError("this user may write there")
    with open_store(url, read_only=True) as store:
        assert store.history(1) == {"user_id": 1, "timestamp": [10], "item_id": [5]}
    with pytest.raises(OSError, match=r"Permission denied") as error:
        open_store(url)
    assert error_line(error.value) == f"{url}: Permission denied"


def test_a_store_that_may_only_be_read(dare: Dare, tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("needs to be another user")
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n1,5,10\n")
    # The folder of the test itself is its user's alone.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        store = Path(folder, "store")
        options = ("--events", tmp_path / "log.csv", "events.category_id=null")
        assert dare("store", "load", "--store", store, *options)[0] == 0
        (store / "data.mdb").chmod(0o644)
        (store / "lock.mdb").chmod(0o666)  # in which readers say what they read
        assert wait([start(as_nobody, str(store), store / "data.mdb")]) == [0]
