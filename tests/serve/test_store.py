"""What every store of histories does, whatever it keeps them in: one suite, for LMDB and for Redis."""

import itertools
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from pipeline.serve import lmdb_store
from pipeline.serve.store import HistoryStore, open_store
from pipeline.serve.stored_columns import StoredColumn, StoredColumns
from schemas.errors import RequestError, UserError
from tests.launcher import start, wait
from tests.redis_server import is_installed, redis_server
from tests.serve.stores import COLUMNS, Event, PlainStore, columns_of, events_of
from tests.serve.test_stored_record import ALIKE, ANY

PLAIN = StoredColumns(
    user="user",
    user_type="text",
    item="item",
    timestamp="time",
    behaviors=(StoredColumn(name="item", kind="integer"),),
)
NO_FEATURES: dict[str, Any] = {name: [None] for name in ("kind", "price", "tags", "sizes")}
"""Of one event."""
NewUrl = Callable[[], str]


@pytest.fixture(scope="module", params=["lmdb", pytest.param("redis", marks=pytest.mark.redis)])
def new_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewUrl]:
    """URLs of stores that are not there yet."""
    folder = tmp_path_factory.mktemp(request.param)
    numbers = itertools.count()
    if request.param == "lmdb":
        yield lambda: f"lmdb:{folder / str(next(numbers))}"
        return
    if not is_installed():
        pytest.skip("needs Debian's redis-server")
    with redis_server(folder) as port:
        yield lambda: f"redis://127.0.0.1:{port}/0?prefix={next(numbers)}"


USERS = st.sampled_from([0, 1, 2, 2**63 - 1])


@given(st.lists(st.tuples(USERS, st.one_of(ANY, ALIKE)), max_size=6), st.integers(1, 7))
@settings(max_examples=12, deadline=None)
def test_a_store_is_the_last_events_of_all_that_came(
    new_url: NewUrl, batches: list[tuple[int, list[Event]]], keep: int
) -> None:
    url, plain = new_url(), PlainStore(keep)
    with open_store(url, COLUMNS, keep) as store:
        for user, events in batches:
            appended = store.append(user, columns_of(events))
            assert (appended, appended.known, appended.not_kept) == plain.add(user, events)
            assert events_of(store.history(user)) == plain.history(user)
    with open_store(url) as store:
        there = sorted(user for user in plain.came if plain.came[user])
        assert store.users() == there
        assert len(store) == len(there)
        for user in (0, 1, 2, 2**63 - 1):
            assert events_of(store.history(user)) == plain.history(user)


def test_a_store_says_itself_what_it_has(new_url: NewUrl) -> None:
    url = new_url()
    with pytest.raises(UserError, match="there is no store of histories; `dare store load` makes one"):
        open_store(url)
    with open_store(url, COLUMNS, 5) as store:
        assert store.append(1, {"time": [3], "item": [4], "city": "Rome"} | NO_FEATURES) == 1
    with open_store(url, read_only=True) as store:
        assert (store.columns, store.keep) == (COLUMNS, 5)
        assert store.history(1) == {"user": 1, "time": [3], "item": [4], **NO_FEATURES, "city": "Rome"}
        assert store.history(2) == {"user": 2, **{name: [] for name in ("time", "item", *NO_FEATURES)}}
    with open_store(url, COLUMNS) as first, open_store(url, COLUMNS) as second:
        first.append(1, {"time": [9], "item": [9]} | NO_FEATURES)
        assert second.history(1)["item"] == [4, 9]
    with pytest.raises(UserError, match="it keeps the last 5 events of a user, not 6; load the log into a new store"):
        open_store(url, COLUMNS, 6)
    other = COLUMNS.model_copy(update={"timestamp_unit": "ms"})
    with pytest.raises(UserError, match="it has timestamp_unit=s, and ms is wanted; load the log into a new store"):
        open_store(url, other)


def test_users_are_told_apart_and_come_in_order(new_url: NewUrl) -> None:
    users = ["1", "10", "2", "Ä" * 400, "é", "x" * 501, "日本", "a b\n\x00"]
    with open_store(new_url(), PLAIN, 5) as store:
        for number, user in enumerate(users):
            store.append(user, {"time": [1], "item": [number]})
        assert [store.history(user)["item"] for user in users] == [[number] for number in range(len(users))]
        assert sorted(store.users()) == sorted(users)
        short = sorted((user for user in users if len(user.encode()) <= 500), key=str.encode)
        assert store.users(count=4) == short[:4]
        assert store.users("10", 2) == ["10", "2"]
        with pytest.raises(RequestError, match="user is 1; ids of users are texts here"):
            store.append(1, {"time": [1], "item": [1]})
    with (
        open_store(new_url(), COLUMNS, 5) as store,
        pytest.raises(RequestError, match="user is '1'; ids of"),
    ):
        store.history("1")


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (
            {"time": [1, 2], "item": [1]},
            r"events.item has 1 values, events.time has 2; give each event a value in both",
        ),
        (
            {"time": [1], "item": [1], "tag": [1]},
            "events: no column 'tag'; there are city, item, kind, price, sizes, tags",
        ),
        ({"time": [1]}, "events: column item is missing$"),
        ({"time": [1, None], "item": [1, 2]}, r"events.time\[1\] is missing; an event needs a time"),
        ({"time": [1, 2], "item": [1, None]}, r"events.item\[1\] is missing; an event needs an item"),
        ({"time": [1, 2], "item": [1, 1.5]}, r"events.item\[1\]: 1.5 is not an integer"),
        ({"time": [1, "x"], "item": [1, 2]}, r"events.time\[1\] is 'x', text where others are a number"),
        ({"time": [2**63], "item": [1]}, r"events.time\[0\] is 9223372036854775808, which is no value"),
        ({"time": [-5], "item": [1]}, r"events.time\[0\] is -5, a time before 1970 or after 9999; times are"),
        ({"time": [1], "item": [-1]}, r"events.item\[0\] is -1; ids are 0 or more"),
        ({"time": 1, "item": [1]}, "events.time is 1; give a list"),
        ({"time": "12", "item": [1]}, "events.time is '12'; give a list"),
        ({"time": [1], "item": [True]}, r"events.item\[0\] is True; integers are expected"),
        (
            {"time": [1, 2], "item": [1, 2], "price": [1.5, True]},
            r"events.price\[1\] is True, true or false where others are a number",
        ),
        ({"time": [1, 2], "item": [1, 2], "kind": ["a", b"b"]}, r"events.kind\[1\] is b'b', bytes where others are"),
        ({"time": [1], "item": [1], "kind": [["a"]]}, r"events.kind\[0\] is \['a'\]; texts are expected"),
        ({"time": [1], "item": [1], "tags": ["a"]}, r"events.tags\[0\] is 'a'; lists of texts are expected"),
        ({"time": [1], "item": [1], "price": [1e300]}, r"events.price\[0\]: 1e.300 is infinite, or too"),
        ({"time": [1], "item": [1], "kind": ["x" * 65_537]}, "is longer than 64 KiB"),
        ({"city": ["Rome"]}, "events.city is of the user; give one value, not a list"),
    ],
)
def test_events_that_are_no_events(events: Any, message: str) -> None:
    times = events.get("time", ())
    whole = {
        name: [None] * len(times) if isinstance(times, list) else [None] for name in NO_FEATURES if "time" in events
    }
    with pytest.raises(RequestError, match=message):
        COLUMNS.events(whole | events)


def test_columns_of_events_are_not_left_out(new_url: NewUrl) -> None:
    """Left out once and given once, one click would be two."""
    event = {"time": [3], "item": [4]} | NO_FEATURES
    with open_store(new_url(), COLUMNS, 5) as store:
        for name in event:
            said = f"events: column {name} is missing" + "; give it, with null for a value" * (name in NO_FEATURES)
            with pytest.raises(RequestError, match=said):
                store.append(1, {other: values for other, values in event.items() if other != name})
        assert store.history(1)["item"] == []
        assert [store.append(1, event) for _ in range(2)] == [1, 0]
        # What is known of the user comes alone.
        assert store.append(1, {"city": "Rome"}) == 0
        assert store.history(1)["city"] == "Rome"


def append_some(url: str, process: int) -> None:
    with open_store(url) as store:
        for number in range(10):
            assert store.append("all", {"time": [number], "item": [process * 100 + number]}) == 1
            store.append(f"{process}", {"time": [number], "item": [number]})


def test_processes_that_append_to_the_same_users(new_url: NewUrl) -> None:
    url = new_url()
    with open_store(url, PLAIN, 1_000):
        pass
    assert wait([start(append_some, url, process) for process in range(3)]) == [0] * 3
    with open_store(url) as store:
        items = [process * 100 + number for number in range(10) for process in range(3)]
        assert store.history("all")["time"] == [number for number in range(10) for _ in range(3)]
        assert sorted(store.history("all")["item"]) == sorted(items)
        assert [store.history(user)["item"] for user in store.users(count=3)] == [list(range(10))] * 3


def test_threads_that_append_to_the_same_user(new_url: NewUrl) -> None:
    with open_store(new_url(), PLAIN, 1_000) as store:

        def some(thread: int) -> None:
            for number in range(10):
                store.append("all", {"time": [number], "item": [thread * 100 + number]})
                assert number in store.history("all")["time"]

        threads = [Thread(target=some, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(store.history("all")["item"])) == 40


def append_until_killed(url: str, acknowledged: Path) -> None:
    with open_store(url) as store, acknowledged.open("a", buffering=1) as file:
        for number in itertools.count():
            # Many times as large as a page, so that half of it could be written.
            items = list(range(number * 1_000, number * 1_000 + 1_000))
            store.append("all", {"time": items, "item": items})
            file.write(f"{number}\n")


def test_a_writer_that_is_killed(new_url: NewUrl, tmp_path: Path) -> None:
    url = new_url()
    with open_store(url, PLAIN, 1_000_000):
        pass
    for attempt in range(2):
        acknowledged = tmp_path / f"{attempt}.txt"
        process = start(append_until_killed, url, acknowledged)
        until = time.monotonic() + 120
        while not acknowledged.exists() or acknowledged.stat().st_size < 10:
            assert process.is_alive()
            assert time.monotonic() < until
            time.sleep(0.01 + 0.003 * attempt)
        process.kill()
        assert wait([process]) == [-signal.SIGKILL]
        whole = [int(line) for line in acknowledged.read_text().split("\n")[:-1]]
        with open_store(url) as store:
            items = store.history("all")["item"]
            assert len(items) >= 1_000 * (whole[-1] + 1), "what was acknowledged is there"
            assert items == list(range(len(items)))
            assert len(items) % 1_000 == 0, "and nothing by half"
            # The dead writer's lock is no other one's trouble.
            assert store.append("next", {"time": [attempt], "item": [attempt]}) == 1


def grow(url: str) -> None:
    lmdb_store._FIRST_SIZE = 1 << 16
    with open_store(url) as store:
        for number in range(20):
            items = list(range(number * 2_000, number * 2_000 + 2_000))
            store.append(f"user {number}", {"time": items, "item": [item * 2**40 for item in items]})


def test_a_store_grows_under_its_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_store, "_FIRST_SIZE", 1 << 16)
    url = str(tmp_path / "store")
    with open_store(url, PLAIN, 10_000) as store:
        process = start(grow, url)
        last = 0
        # What is read meanwhile is whole, and nothing that was there goes away.
        while process.is_alive():
            users = store.users()
            assert len(users) >= last
            last = len(users)
            assert all(len(store.history(user)["item"]) == 2_000 for user in users)
        assert wait([process]) == [0]
        assert len(store) == 20
        assert store.append("mine", {"time": [1], "item": [2]}) == 1
    assert (tmp_path / "store" / "data.mdb").stat().st_size > 4 << 16


def test_other_urls_and_folders(tmp_path: Path) -> None:
    def refused(url: object, columns: StoredColumns | None = PLAIN) -> str:
        with pytest.raises(UserError) as error:
            open_store(str(url), columns)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "s3: is no kind of store; a store is lmdb:PATH, a path, or redis://HOST" in refused("s3://bucket/store")
    assert "memcached://host:1: memcached: is no kind of store" in refused("memcached://me:secret@host:1")
    assert "path of the store is missing" in refused("lmdb:")
    assert "its path is the number of a database" in refused("redis://127.0.0.1/x")
    assert "its only option is ?prefix=NAME" in refused("redis://127.0.0.1/0?timeout=3")
    assert "there is no store of histories; `dare store load` makes one" in refused(tmp_path / "none", None)
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("text")
    assert "file: not a store of histories, which is a folder" in refused(tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("text")
    assert "other: not a store of histories: a folder with other files" in refused(tmp_path / "other")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "data.mdb").write_bytes(b"text" * 5_000)
    assert "data.mdb is damaged, or no database of LMDB" in refused(tmp_path / "damaged")


def changed_description(store: HistoryStore, former: bytes, now: bytes) -> None:
    assert isinstance(store, lmdb_store.LmdbStore)
    store._mapped.write(
        lambda transaction: transaction.put(
            lmdb_store.DESCRIPTION, bytes(transaction.get(lmdb_store.DESCRIPTION) or b"").replace(former, now)
        )
    )


def test_a_store_of_another_format_or_damaged(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    with open_store(url, PLAIN, 5) as store:
        changed_description(store, b'"keep":5', b'"keep":6')
    with pytest.raises(UserError, match="store differs from its checksum; load the log into a new store"):
        open_store(url)
    with open_store(str(tmp_path / "next"), PLAIN, 5) as store:
        store._mapped.write(lambda transaction: transaction.put(lmdb_store.DESCRIPTION, b'{"format": 2}'))
    with pytest.raises(UserError, match="a store of format 2, and this program reads format 1; use the program"):
        open_store(str(tmp_path / "next"))
    with open_store(str(tmp_path / "third"), PLAIN, 5) as store:
        store.append("Ann", {"time": [1], "item": [2]})
        store._mapped.write(lambda transaction: transaction.put(b"\x02Ann", b"\x01abcdefgh"))
        with pytest.raises(UserError, match=r"^user 'Ann': its record is damaged; load the log into a new store"):
            store.history("Ann")
        store._mapped.write(lambda transaction: transaction.delete(lmdb_store.DESCRIPTION))
    with pytest.raises(UserError, match="a database of LMDB, but no store of histories; name another folder"):
        open_store(str(tmp_path / "third"), PLAIN)
