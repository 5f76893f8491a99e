"""Layers of histories against lists in plain Python: what is gathered, how they are merged, what a damage does."""

import errno
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import ibis
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.hashing import hash_values
from pipeline.ingest import definition, histories, layers
from pipeline.ingest.duckdb_engine import DuckDBEngine
from pipeline.ingest.histories import Histories, HistoryFile, HistoryWriter
from pipeline.ingest.layers import gather, keep_layers
from schemas.errors import UserError
from schemas.manifest import Chain, Layer, Manifest
from schemas.shards import FeatureRecord, RawType, layer_schema
from tests.examples import examples

FEATURES = (
    FeatureRecord(name="action", of="behavior", kind="id", encoding="dictionary", type="text", rows=9),
    FeatureRecord(name="city", of="user", kind="id", encoding="dictionary", type="text", rows=9),
    FeatureRecord(name="dwell", of="behavior", kind="number", encoding="buckets", rows=3),
    FeatureRecord(name="age", of="user", kind="number", encoding="scale", rows=0),
)
NO_NUMBER = definition.NO_NUMBER

Behavior = tuple[int, int, int, float]
"""timestamp, item, action, dwell."""
User = str | int
Day = dict[User, tuple[int, float, list[Behavior]]]
"""User -> city, age, behaviours in order."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DuckDBEngine]:
    engine = DuckDBEngine(tmp_path_factory.mktemp("engine"), 1 << 30, 1)
    yield engine
    engine.close()


def touched(engine: DuckDBEngine, users: list[User]) -> ibis.expr.types.Table:
    text = isinstance(users[0], str)
    ids = pa.array(users, pa.string() if text else pa.int64())
    columns = {"user_id": ids} | ({"user_number": hash_values(ids)} if text else {})
    return definition.touched([ibis.memtable(pa.table(columns))], seed=3)


def keys(engine: DuckDBEngine, users: list[User]) -> dict[User, int]:
    return {row["user_id"]: row["user_key"] for row in engine.fetch(touched(engine, users)).to_pylist()}


class Tower:
    """Data sets of a chain as far as layers go, a folder a day."""

    def __init__(self, engine: DuckDBEngine, folder: Path, kind: RawType, keep: int) -> None:
        self.engine, self.folder, self.kind, self.keep = engine, folder, kind, keep
        self.schema = layer_schema(FEATURES, user_type=kind)
        self.days: list[Manifest] = []
        self.written = 0
        """Bytes of all files that are not links."""

    def at(self, number: int) -> Path:
        return self.folder / f"d{number}"

    def add(self, day: Day) -> Manifest:
        number = len(self.days)
        folder = self.at(number)
        folder.mkdir()
        key = keys(self.engine, list(day)) if day else {}
        ordered = sorted(day, key=lambda user: (key[user], user))
        files, behaviors = [], 0
        for part in range(0, len(ordered), 5):
            users = ordered[part : part + 5]
            mine = [behavior for user in users for behavior in day[user][2][-self.keep :]]
            columns = list(zip(*mine, strict=True)) if mine else [[], [], [], []]
            block = Histories(
                pa.array(users, self.schema.field("user_id").type),
                np.array([key[user] for user in users], np.int32),
                np.array([len(day[user][2][-self.keep :]) for user in users], np.int64),
                {
                    "user_city": np.array([day[user][0] for user in users], np.int32),
                    "user_age": np.array([day[user][1] for user in users], np.float64),
                },
                {
                    "history_item": np.array(columns[1], np.int32),
                    "history_timestamp": np.array(columns[0], np.int64),
                    "history_action": np.array(columns[2], np.int32),
                    "history_dwell": np.array(columns[3], np.float64),
                },
            )
            with HistoryWriter(folder / f"history-{number:05}-{len(files):05}.arrow", self.schema) as writer:
                for cut in range(0, len(users), 2):
                    writer.add(block.slice(cut, min(cut + 2, len(users))))
            files.append(writer.path.name)
            behaviors += writer.behaviors
        own = Layer(first_day=number, last_day=number, files=tuple(files), users=len(day), behaviors=behaviors)
        self.written += sum((folder / name).stat().st_size for name in files)
        base = self.days[-1] if self.days else None
        kept = keep_layers(self.at(number - 1) if base else None, base, own, folder, self.keep)
        merged = [
            file for file in kept.files if file.path.count("-") == 3 and (folder / file.path).stat().st_nlink == 1
        ]
        self.written += sum(file.bytes for file in merged)
        assert {file.path for file in kept.files} == {path.name for path in folder.iterdir()}
        assert {file.path for file in kept.files} == {name for layer in kept.layers for name in layer.files}
        manifest = Manifest.model_construct(
            chain=Chain(first_timestamp=0, last_timestamp=0, rows=None, layers=kept.layers),
            files=kept.files,
            shards=(),
            features=FEATURES,
            user_type=self.kind,
            settings={"history": {"keep": self.keep}},
        )
        manifest.verify(folder)
        self.days.append(manifest)
        return manifest


def known(days: list[Day], user: User, keep: int) -> tuple[int, float, list[Behavior]]:
    city, age, behaviors = 0, NO_NUMBER, []
    for day in days:
        if user in day:
            city = day[user][0] or city
            age = day[user][1] if day[user][1] != NO_NUMBER else age
            behaviors += day[user][2]
    return city, age, behaviors[-keep:]


def check(tower: Tower, days: list[Day], wanted: list[User], work: Path) -> None:
    gathered = gather(tower.engine, touched(tower.engine, wanted), tower.at(len(days) - 1), tower.days[-1], work)
    lines = [tuple(row.values()) for row in tower.engine.fetch(gathered.lines).to_pylist()]
    expected = {user: known(days, user, tower.keep) for user in wanted}
    if tower.kind == "text":
        # What the engine makes keys of.
        for row in lines:
            assert row[1] == hash_values(pa.array([row[0]]))[0].as_py()
        lines = [(row[0], *row[2:]) for row in lines]
    # Of each user in time order, which is that of the file.
    assert sorted(lines) == sorted(
        (user, item, time, action, dwell) for user in wanted for time, item, action, dwell in expected[user][2]
    )
    assert gathered.users is not None
    users = {row["key"]: (row["u_city"], row["u_age"]) for row in tower.engine.fetch(gathered.users).to_pylist()}
    assert users == {user: expected[user][:2] for user in wanted if any(user in day for day in days)}
    assert gathered.behaviors == len(lines)
    assert gathered.known == sum(bool(expected[user][2]) for user in wanted)
    assert gathered.touched == len(wanted)


# Ids that share a residue of the key's prime have one key, and so do the shards of a day meet at one.
INTEGERS = [1, 2, 5, 2**31, 2**31 + 4, 2**32 + 3, *range(40, 60)]
TEXTS = ["", "a", "ä", "e'\"", "user 5", *(f"u{number}" for number in range(20))]


def days_of(users: list[User]) -> st.SearchStrategy[list[Day]]:
    behavior = st.tuples(st.integers(1, 5), st.integers(0, 4), st.sampled_from([NO_NUMBER, 0.5, -2.0]))
    mine = st.tuples(st.integers(0, 2), st.sampled_from([NO_NUMBER, 1.5]), st.lists(behavior, max_size=6))
    day = st.dictionaries(st.sampled_from(users), mine, max_size=12)

    def timed(days: list[Day]) -> list[Day]:
        return [
            {
                user: (city, age, [(10 * number + step, *rest) for step, rest in enumerate(behaviors)])
                for user, (city, age, behaviors) in day.items()
            }
            for number, day in enumerate(days)
        ]

    return st.lists(day, min_size=1, max_size=8).map(timed)


@settings(max_examples=examples(10, 60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(["integer", "text"]), keep=st.integers(1, 9))
def test_what_is_gathered(
    engine: DuckDBEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    data: st.DataObject,
    kind: RawType,
    keep: int,
) -> None:
    users: list[User] = list(INTEGERS) if kind == "integer" else list(TEXTS)
    days = data.draw(days_of(users))
    wanted = data.draw(st.lists(st.sampled_from(users), min_size=1, unique=True))
    # Few in a record batch, a file and a part, so that all of them have borders.
    for module, name, size in ((histories, "BATCH", 20), (layers, "USERS", 3), (layers, "BEHAVIORS", 7)):
        monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(layers, "FILE_BEHAVIORS", 25)
    folder = tmp_path / "chain"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tower = Tower(engine, folder, kind, keep)
    for number, day in enumerate(days):
        tower.add(day)
        check(tower, days[: number + 1], wanted, tmp_path)
        shutil.rmtree(tower.at(number - 1), ignore_errors=True)


def test_layers_grow_with_the_logarithm(engine: DuckDBEngine, tmp_path: Path) -> None:
    """30 days after a first one of 100 times a day's behaviours."""
    rng = np.random.default_rng(0)
    tower, days = Tower(engine, tmp_path, "integer", 1000), []
    for number in range(31):
        users = range(1, 601) if number == 0 else rng.choice(np.arange(1, 700), 30, replace=False).tolist()
        times = 10 if number == 0 else 2
        days.append(
            {int(user): (0, NO_NUMBER, [(number * 100 + step, 1, 0, 0.0) for step in range(times)]) for user in users}
        )
        manifest = tower.add(days[-1])
        assert manifest.chain is not None
        behaviors = [layer.behaviors for layer in manifest.chain.layers]
        assert sum(behaviors) == sum(len(mine) for day in days for _, _, mine in day.values()), "nothing is lost"
        assert len(behaviors) <= 2 + math.log2(sum(behaviors) / behaviors[-1])
        assert [layer.first_day for layer in manifest.chain.layers] == sorted(
            layer.first_day for layer in manifest.chain.layers
        )
        if number == 0:
            base, tower.written = tower.written, 0
    check(tower, days, [*range(1, 700)], tmp_path)
    alone = Tower(engine, tmp_path / "alone", "integer", 1000)
    alone.folder.mkdir()
    alone.days, alone.written = [], 0
    for day in days[1:]:
        # Each as if it were a first day: its own bytes.
        alone.days = []
        shutil.rmtree(alone.at(0), ignore_errors=True)
        alone.add(day)
    assert tower.written < 6 * alone.written + base


def damaged(path: Path, content: bytes) -> None:
    # Another file in its place: the old one may still be mapped.
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["integer", "text"])
def test_a_flipped_bit_is_an_error_or_of_somebody_else(engine: DuckDBEngine, tmp_path: Path, kind: RawType) -> None:
    users: list[User] = list(range(20, 40)) if kind == "integer" else [f"user {number}" for number in range(20)]
    day: Day = {
        user: (1 + number % 2, float(number), [(step, 1 + step, 2, 0.25) for step in range(number % 5)])
        for number, user in enumerate(users)
    }
    tower = Tower(engine, tmp_path / "chain", kind, 9)
    tower.folder.mkdir()
    manifest = tower.add(day)
    wanted = np.array(sorted(keys(engine, users[:3]).values()), np.int32)

    def read(path: Path) -> list[object]:
        file = HistoryFile(path, tower.schema)
        # As the manifest's number is compared, once the last file of a layer was read.
        if file.users != 5:
            raise UserError(f"{path} is damaged")
        return [
            (taken.user_id_U.to_pylist(), *(values.tolist() for values in (taken.users | taken.behaviors).values()))
            for where in file.find(wanted)
            for taken in [file.take(where.batch, where.row_K)]
        ]

    rng = np.random.default_rng(1)
    found, harmless = [], 0
    for file in manifest.files:
        path = tower.at(0) / file.path
        content, before = path.read_bytes(), read(path)
        for place in rng.choice(len(content), 500, replace=False).tolist():
            changed = bytearray(content)
            changed[place] ^= 1 << int(rng.integers(8))
            damaged(path, bytes(changed))
            try:
                after = read(path)
            except UserError as error:
                found.append(str(error))
            else:
                harmless += 1
                assert after == before
        for length in (0, 7, len(content) // 2, len(content) - 1):
            damaged(path, content[:length])
            with pytest.raises(UserError, match=file.path):
                read(path)
        damaged(path, content)
    assert len(found) > 100
    assert all("is damaged" in error and "history-00000" in error for error in found)
    assert harmless > 100


def test_all_that_is_merged_is_verified(engine: DuckDBEngine, tmp_path: Path) -> None:
    def day(number: int) -> Day:
        return {user: (1, 0.5, [(number, 3, 1, 0.25)]) for user in range(4)}

    tower = Tower(engine, tmp_path / "chain", "integer", 9)
    tower.folder.mkdir()
    (file,) = tower.add(day(0)).files
    path = tower.at(0) / file.path
    content = bytearray(path.read_bytes())
    content[content.index(np.full(4, 3, np.int32).tobytes()) + 12] ^= 1
    damaged(path, bytes(content))
    with pytest.raises(UserError, match=f"{file.path} is damaged"):
        tower.add(day(1))
    assert path.read_bytes() == content


@pytest.mark.parametrize("links", [True, False])
def test_layers_of_before_are_links_or_copies(
    engine: DuckDBEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if not links:
        monkeypatch.setattr("os.link", refused)
    tower = Tower(engine, tmp_path / "chain", "integer", 9)
    tower.folder.mkdir()
    days: list[Day] = [{user: (1, 0.5, [(0, 3, 1, 0.25)]) for user in range(9)}, {3: (2, 0.5, [(10, 4, 1, 0.25)])}]
    before = tower.add(days[0]).files
    after = tower.add(days[1]).files
    assert after[: len(before)] == before, "their records, which cost no reading"
    for file in before:
        assert (tower.at(1) / file.path).stat().st_nlink == 1 + links
    shutil.rmtree(tower.at(0))
    check(tower, days, [3, 4, 5], tmp_path)
