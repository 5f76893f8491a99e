"""Data on an object store: logs that are prepared from URLs to URLs, and streams that read them, with faults or not."""

import gzip
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import schemas.stores
from pipeline.files import output_folder
from pipeline.ingest.prepare import CONTENTS
from pipeline.paths import input_files, location
from pipeline.stream.history_stream import HistoryStream
from schemas.errors import UserError
from schemas.manifest import MANIFEST, Manifest, fingerprint
from schemas.storage import RemotePath, arrow_file
from schemas.stream import StreamSettings
from tests.data.conftest import Dare
from tests.object_store import STORES, Fault, MotoStore, ObjectStore, object_store

LENIENT = ["split.min_behaviors=1", "split.negatives=1"]


@pytest.fixture(scope="module", params=STORES)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(request.param, tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture
def store(running: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    monkeypatch.setattr(schemas.stores, "FIRST_WAIT_S", 0.01)
    yield running
    running.fault, running.failed = None, []
    for entry in location("s3://bucket").iterdir():
        assert isinstance(entry, RemotePath)
        entry.remove_tree()


@pytest.fixture
def faulty(store: ObjectStore) -> ObjectStore:
    """A store that can be told to fail."""
    if not isinstance(store, MotoStore):
        pytest.skip("only moto's server fails when it is told to")
    return store


def write_logs(folder: Path) -> None:
    """Events as CSV, packed CSV and a marker; impressions as Parquet."""
    random = np.random.default_rng(7)
    folder.mkdir()
    header = "user_id,item_id,category_id,timestamp\n"
    for part in range(2):
        users, items, times = random.integers(1, 40, 900), random.integers(1, 60, 900), random.integers(0, 10**6, 900)
        lines = [f"{u},{i},{i % 5},{t}\n" for u, i, t in zip(users, items, times, strict=True)]
        (folder / f"events-{part}.csv").write_text(header + "".join(lines))
    (folder / "events-1.csv.gz").write_bytes(gzip.compress((folder / "events-1.csv").read_bytes(), mtime=0))
    (folder / "events-1.csv").unlink()
    (folder / "_SUCCESS").write_text("")
    shown = {
        "user_id": random.integers(1, 40, 300),
        "item_id": (items := random.integers(1, 60, 300)),
        "category_id": items % 5,
        "timestamp": random.integers(5 * 10**5, 10**6, 300),
        "label": random.integers(0, 2, 300),
    }
    pq.write_table(pa.table(shown), folder / "shown.parquet")


def upload(store: ObjectStore, folder: Path, name: str) -> None:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            (store.path(name) / file.relative_to(folder).as_posix()).upload(file)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.is_dir()}


def prepare_arguments(logs: str, out: object) -> list[object]:
    return [
        *("prepare", "--events", f"{logs}/events-*", "--impressions", f"{logs}/shown.parquet", "--out", out),
        *("split.min_history=0", "shards.behaviors_per_shard=500", "shards.users_per_row_group=8"),
    ]


@pytest.mark.parametrize("engine", ["duckdb", pytest.param("spark", marks=pytest.mark.spark)])
def test_prepare_from_a_store_to_a_store_writes_what_it_writes_on_a_disk(
    store: ObjectStore, dare: Dare, tmp_path: Path, engine: str
) -> None:
    write_logs(tmp_path / "logs")
    upload(store, tmp_path / "logs", "logs")
    code, said = dare(*prepare_arguments(str(tmp_path / "logs"), tmp_path / "out"))
    assert code == 0, said
    code, said = dare(*prepare_arguments("s3://bucket/logs", "s3://bucket/sets/out"), "--engine", engine)
    assert code == 0, said
    assert "s3://bucket/sets/out" in said
    assert contents(tmp_path / "out") == contents(store.path("sets/out"))
    # Once more is refused, and allowed.
    again = prepare_arguments("s3://bucket/logs", "s3://bucket/sets/out")
    assert "not empty; choose another folder or pass --overwrite" in dare(*again)[1]
    store.path("sets/out/shard-99999.parquet").write_bytes(b"of an earlier one")
    assert dare(*again, "--overwrite")[0] == 0
    assert contents(tmp_path / "out") == contents(store.path("sets/out"))
    for command in (["inspect", "s3://bucket/sets/out", "--verify"], ["stream", "s3://bucket/sets/out"]):
        there = dare(*command)
        here = dare(*[str(tmp_path / "out") if "://" in word else word for word in command])
        assert there[0] == here[0] == 0
        for said in (there[1], here[1]):
            assert "behaviours" in said
        assert numbers(there[1]) == numbers(here[1])


def test_a_day_of_a_chain_at_a_store_is_what_it_is_on_a_disk(store: ObjectStore, dare: Dare, tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    for where in (str(tmp_path / "sets"), "s3://bucket/sets"):
        for day in range(2):
            log = tmp_path / f"events{day}.csv"
            lines = [
                f"{u},{(3 * u + k) % (8 + day)},{k % 3},{86400 * day + 10 * k}" for u in range(4) for k in range(6)
            ]
            log.write_text("\n".join(["user_id,item_id,category_id,timestamp", *lines]) + "\n")
            arguments = ["--events", log, "--out", f"{where}/{day}"]
            chain = ["--extend", f"{where}/{day - 1}"] if day else [*LENIENT, "history.keep=9"]
            code, said = dare("prepare", *arguments, *chain)
            assert code == 0, said
    for day in range(2):
        assert contents(tmp_path / "sets" / str(day)) == contents(store.path(f"sets/{day}"))
    code, said = dare("prepare", "--extend", "s3://bucket/sets/1", "--events", log, "--out", "s3://bucket/sets/1/2")
    assert code == 1
    assert "which stays as it is" in said
    code, said = dare(
        "prepare", "--dictionaries", "s3://bucket/sets/0", *arguments[:2], *LENIENT, "--out", tmp_path / "d"
    )
    assert code == 0, said


def numbers(said: str) -> list[str]:
    """What a command has said but for where it looked and how long it took."""
    said = re.sub(r"\S*/out\S*|one epoch in .*?samples/s|.*read an epoch.*\n", "", said)
    return said.split()


def test_names_mean_the_same_files_as_on_a_disk(store: ObjectStore, tmp_path: Path) -> None:
    names = ("a/part-0.csv", "a/part-1.csv", "a/_SUCCESS", "a/day=2/part-0.csv", "a/.x/y.csv", "b[1].csv", "b1.csv")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    upload(store, tmp_path, "top")
    for name in ("a", "a/", "a/*", "a/*.csv", "a/**/*.csv", "a/d*", "a/.x/*", "b[1].csv", "b[[]1].csv", "b?.csv", "*"):
        here = [file.relative_to(tmp_path).as_posix() for file in input_files("events", (f"{tmp_path}/{name}",))]
        there = input_files("events", (f"s3://bucket/top/{name}",))
        assert [str(file.relative_to(store.path("top"))) for file in there] == here, name
    both = input_files("events", (f"{tmp_path}/b1.csv", "s3://bucket/top/b1.csv", "s3://bucket/top/b?.csv"))
    assert sorted(map(str, both)) == sorted([f"{tmp_path}/b1.csv", "s3://bucket/top/b1.csv"])
    assert fingerprint(both[0]) == fingerprint(both[1])
    for name, said in (("c", "no such file"), ("c*", "no such file"), ("a/_S*", "begin with _ or .")):
        with pytest.raises(UserError, match=re.escape(f"events: s3://bucket/top/{name}: ")) as error:
            input_files("events", (f"s3://bucket/top/{name}",))
        assert said in str(error.value)


def test_paths_of_a_store_are_paths(store: ObjectStore) -> None:
    path = location(f"s3://bucket/a/b.csv?endpoint_override={store.address}&scheme=http")
    assert str(path) == f"s3://bucket/a/b.csv?endpoint_override={store.address}&scheme=http"
    assert (path.name, path.suffix, path.stem) == ("b.csv", ".csv", "b")
    assert path.parent / "b.csv" == path
    assert pickle.loads(pickle.dumps(path)) == path
    assert path != Path("/a/b.csv") != path
    assert sorted([path, Path("/z")]) == [Path("/z"), path]
    with pytest.raises(TypeError, match="no path of this machine"):
        os.fspath(path)
    assert isinstance(path, RemotePath)
    path.write_bytes(bytes(range(256)))
    assert store.path("a/b.csv").read_bytes() == bytes(range(256))
    with path.open("rb") as file:
        file.seek(-6, 2)
        assert (file.read(2), file.tell(), file.read()) == (b"\xfa\xfb", 252, bytes(range(252, 256)))
    with arrow_file(path) as file:
        assert file.size() == 256
    assert location("file:///a/b") == Path("/a/b")
    assert str(location("hdfs:///user/x")) == "hdfs:///user/x"
    assert str(location("hdfs://name:8020/user/x").parent) == "hdfs://name:8020/user"


def test_an_interrupted_upload_is_no_data_set_and_is_written_over(
    faulty: ObjectStore, dare: Dare, tmp_path: Path
) -> None:
    write_logs(tmp_path / "logs")
    arguments = prepare_arguments(str(tmp_path / "logs"), "s3://bucket/out")
    assert dare(*arguments)[0] == 0
    whole = contents(faulty.path("out"))
    faulty.fault = lambda method, path: "503" if method in ("PUT", "POST") and "shard-00002" in path else None
    code, said = dare(*arguments, "--overwrite")
    assert code == 1
    assert "s3://bucket/out/shard-00002.parquet: " in said
    assert MANIFEST not in faulty.names("out")
    faulty.fault = None
    code, said = dare("inspect", "s3://bucket/out")
    assert (code, "no manifest.json" in said) == (1, True)
    # Without --overwrite: it is nothing yet.
    assert dare(*arguments)[0] == 0
    assert contents(faulty.path("out")) == whole


def test_a_folder_of_something_else_is_never_written_over(store: ObjectStore) -> None:
    store.path("out/mine.txt").write_bytes(b"mine")
    with (
        pytest.raises(UserError, match=r"holds 'mine\.txt', which this command did not write"),
        output_folder(store.path("out"), CONTENTS, overwrite=True, last=MANIFEST),
    ):
        raise AssertionError
    assert store.names("out") == {"mine.txt"}


def epoch(folder: Path, **settings: Any) -> list[tuple[int, ...]]:
    """All targets of an epoch as they come: user, item, time."""
    settings_of = StreamSettings(batch_size=16, history_length=8, threads=3, **settings)
    with HistoryStream(folder, "train", settings_of, seed=3, shuffle=True) as stream:
        return [
            (batch.user_id_U.tolist()[user], int(item), int(time))
            for batch in stream
            for user, item, time in zip(batch.user_T.tolist(), batch.item_T, batch.timestamp_T, strict=True)
        ]


def every(number: int, fault: Fault) -> Callable[[str, str], Fault | None]:
    """Each request for a shard whose number can be divided fails."""
    seen = iter(range(10**6))

    def decide(method: str, path: str) -> Fault | None:
        return fault if method == "GET" and "shard-" in path and next(seen) % number == number - 1 else None

    return decide


@pytest.mark.parametrize("fault", ["503", "cut", "stall"])
def test_a_store_that_fails_now_and_then_loses_no_row_and_gives_none_twice(
    faulty: ObjectStore, few_users: Path, fault: Fault
) -> None:
    upload(faulty, few_users, "data")
    wanted = epoch(few_users)
    assert epoch(faulty.path("data")) == wanted
    # A connection that stalls costs seconds: once is enough.
    faulty.fault = every(30 if fault == "stall" else 3, fault)
    assert epoch(faulty.path("data")) == wanted
    assert faulty.failed


@pytest.mark.parametrize("fault", ["503", pytest.param("cut", marks=pytest.mark.slow)])
def test_a_store_that_fails_for_good_ends_in_one_line(faulty: ObjectStore, few_users: Path, fault: Fault) -> None:
    upload(faulty, few_users, "data")
    stream = HistoryStream(
        faulty.path("data"), "train", StreamSettings(batch_size=16, history_length=8), seed=3, shuffle=True
    )
    with stream:
        faulty.fault = lambda method, path: fault if method == "GET" else None
        with pytest.raises(UserError, match=r"s3://bucket/data/shard-\d+.parquet: ") as error:
            list(stream)
    assert "\n" not in str(error.value)


def test_a_shard_that_was_changed_on_the_store_is_found(store: ObjectStore, few_users: Path) -> None:
    upload(store, few_users, "data")
    shard = store.path("data") / Manifest.read(few_users).shards[0].path
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"s3://bucket/data/shard-.*differs from its checksum"):
        epoch(store.path("data"))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://no-such-bucket/data", "s3://no-such-bucket/data/manifest.json: there is no such bucket"),
        ("s3://bucket/data", "no manifest.json: not a data set"),
        ("s3://bucket/data?endpoint_override=127.0.0.1:9&scheme=http", "the store cannot be reached"),
        ("s3://bucket/data?endpoint_override=no-such-host.invalid&scheme=http", "the store cannot be reached"),
        ("hdfs://name:8020/data", "needs Java and Hadoop's libhdfs"),
        ("abfs://box@account/data", "a URL holds no credentials"),
        ("abfs://box/data", "needs a package that is not installed"),
    ],
)
def test_what_cannot_be_reached_is_one_line(store: ObjectStore, dare: Dare, url: str, said: str) -> None:
    code, message = dare("inspect", url)
    assert code == 1
    assert said in message
    assert url.partition("://")[0] in message


def test_a_store_that_refuses_says_which_credentials_it_wants(store: ObjectStore, dare: Dare) -> None:
    for keys in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("moto.core.authorization.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)
            patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
            if not keys:
                if isinstance(store, MotoStore):
                    continue  # it fails by itself where a request is not signed
                patch.delenv("AWS_ACCESS_KEY_ID")
                patch.delenv("AWS_SECRET_ACCESS_KEY")
            code, message = dare("inspect", "s3://bucket/data")
        assert code == 1
        assert "s3://bucket/data/manifest.json: the store refuses" in message
        assert "AWS_ACCESS_KEY_ID" in message
