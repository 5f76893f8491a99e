"""Bad input: one clear line that says what, where and what to do."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline.stream.history_stream import HistoryStream
from schemas.manifest import MANIFEST, ROW_GROUP_INDEX
from schemas.settings import load_settings
from schemas.shards import Split
from schemas.stream import StreamSettings
from tests.datasets import manifest_of, random_users, reseal, rewrite_shard, write_dataset, write_manifest

SHARD = "shard-00001.parquet"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data", random_users(30, splits=[Split.TRAIN, Split.TEST]), row_groups_per_shard=2)
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def refusal(folder: Path, settings: StreamSettings | None = None, **arguments: Any) -> str:
    """The message with which the stream refuses to start or to go on."""
    chosen = {"split": "train", "seed": 0, "shuffle": True} | arguments
    with (
        pytest.raises(ValueError) as raised,
        HistoryStream(folder, settings=settings or StreamSettings(), **chosen) as stream,
    ):
        list(stream)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_no_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    assert "not a data set" in refusal(folder)


def test_other_schema_version(folder: Path) -> None:
    write_manifest(folder, manifest_of(folder) | {"schema_version": 99})
    assert "schema version 99" in refusal(folder)


def test_missing_and_changed_shard(folder: Path) -> None:
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[:-1])
    assert f"{SHARD} is {len(content) - 1} bytes" in refusal(folder)
    (folder / SHARD).unlink()
    assert f"{SHARD} is missing" in refusal(folder)


def test_index_of_row_groups(folder: Path) -> None:
    path = folder / ROW_GROUP_INDEX
    index = pq.read_table(path)
    pq.write_table(index.slice(1), path)
    reseal(folder, ROW_GROUP_INDEX)
    assert f"{ROW_GROUP_INDEX} does not match {MANIFEST}" in refusal(folder)
    pq.write_table(index.drop_columns(["users"]), path)
    reseal(folder, ROW_GROUP_INDEX)
    assert f"{ROW_GROUP_INDEX}: columns missing or of another type: users" in refusal(folder)
    path.write_bytes(b"rubbish")
    reseal(folder, ROW_GROUP_INDEX)
    assert f"{ROW_GROUP_INDEX} cannot be read" in refusal(folder)


def test_truncated_shard(folder: Path) -> None:
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[: len(content) // 2])
    reseal(folder, SHARD)
    assert f"{SHARD} cannot be read" in refusal(folder)


def test_corrupt_row_group(folder: Path) -> None:
    content = bytearray((folder / SHARD).read_bytes())
    content[4:260] = bytes(256)
    (folder / SHARD).write_bytes(content)
    message = refusal(folder)
    assert f"{SHARD}: row group 0 cannot be read" in message
    assert "prepare the data set again" in message


def _set(name: str, change: Callable[[pa.Array], pa.Array]) -> Callable[[pa.Table], pa.Table]:
    def changed(table: pa.Table) -> pa.Table:
        index = table.column_names.index(name)
        return table.set_column(index, name, change(table[name].combine_chunks()))

    return changed


def _values(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[pa.ListArray], pa.ListArray]:
    return lambda lists: pa.ListArray.from_arrays(lists.offsets, pa.array(change(lists.values.to_numpy())))


def _nulls(array: pa.Array) -> pa.Array:
    return pc.if_else(pa.array([True] + [False] * (len(array) - 1)), pa.scalar(None, array.type), array)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop_columns(["history_category"]), "column history_category is missing"),
        (
            _set("history_item", lambda a: a.cast(pa.list_(pa.int64()))),
            "column history_item is list<element: int64>, not list",
        ),
        (_set("user_id", lambda a: a.cast(pa.string())), "column user_id is string, not int64"),
        (
            _set("history_item", _values(lambda v: np.where(np.arange(len(v)) == 3, 51, v).astype(np.int32))),
            "the manifest allows 0 to 50",
        ),
        (_set("target_category", _values(lambda v: v - 8)), "column target_category has ids from -"),
        (_set("target_history_end", _values(lambda v: v + 100)), "target_history_end points outside"),
        (_set("target_history_end", _values(lambda v: v - 100)), "target_history_end points outside"),
        (_set("user_id", _nulls), "column user_id has nulls"),
        (_set("history_timestamp", _nulls), "column history_timestamp has nulls"),
        (
            _set("history_timestamp", lambda a: pa.array([row[:-1] for row in a.to_pylist()], a.type)),
            "lists of other lengths",
        ),
        (_set("target_split", _values(lambda v: np.zeros_like(v))), "the index of row groups says"),
        (lambda table: table.slice(0, 7), "the index of row groups says"),
    ],
)
def test_shard_with_wrong_content(folder: Path, change: Callable[[pa.Table], pa.Table], message: str) -> None:
    rewrite_shard(folder, SHARD, change)
    said = refusal(folder)
    assert message in said
    assert SHARD in said
    assert "prepare the data set again" in said


def test_split(folder: Path) -> None:
    assert "no targets to stream in split validation (targets: train " in refusal(folder, split="validation")
    assert "one of train, validation, test" in refusal(folder, split="dev")


def test_rank(folder: Path) -> None:
    assert "below world = 2 (not 2)" in refusal(folder, rank=2, world=2)


def test_sequences_of_unknown_names(folder: Path, tmp_path: Path) -> None:
    settings = StreamSettings(sequences={"carts": {"length": 5, "behavior": ["cart", "buy"]}})
    assert "sequences.carts.behavior: the data set has no such column" in refusal(folder, settings)
    write_dataset(tmp_path / "named", random_users(9, behaviors=2), behaviors=("click", "cart"))
    assert "sequences.carts.behavior: buy is not in the data set; it has click, cart" in refusal(
        tmp_path / "named", settings
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("history_length=0", "history_length: input should be greater than 0"),
        ("batch_size=-1", "batch_size: input should be greater than 0"),
        ("sequences={}", "sequences: "),
        ("sequences.ads.length=0", "sequences.ads.length: input should be greater than 0"),
        ("sequences.ads.behaviour=[cart]", "allowed here: behavior, length, scene"),
        ("batchsize=3", "batchsize: unknown key"),
    ],
)
def test_impossible_settings(override: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        load_settings(StreamSettings, overrides=[override])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
