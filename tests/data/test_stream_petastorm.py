"""petastorm beside today's pyarrow, and its reader with our worker and pool."""

import importlib
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.stream.data_set import DataSet
from pipeline.stream.history_stream import HistoryStream
from pipeline.stream.petastorm_compat import EmptyResultError, StrictThreadPool, ThreadPool, WorkerBase
from pipeline.stream.reader import RowGroupReader
from schemas.stream import StreamSettings
from tests.datasets import random_users, rewrite_shard, write_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("petastorm") / "data"
    write_dataset(folder, random_users(44))
    return folder


def test_compat_module_is_still_needed() -> None:
    """When this fails, petastorm imports by itself: drop the stand-ins of ``petastorm_compat``."""
    plain = subprocess.run([sys.executable, "-c", "import petastorm.reader"], capture_output=True, text=True)
    assert plain.returncode != 0
    assert "pyarrow.filesystem" in plain.stderr


def test_compat_module_leaves_pyarrow_as_it_was() -> None:
    check = (
        "import sys, pyarrow, pyarrow.parquet as pq; dataset = pq.ParquetDataset; "
        "import pipeline.stream.petastorm_compat; "
        "assert pq.ParquetDataset is dataset; "
        "assert not {'pyarrow.filesystem', 'pyarrow.hdfs'} & set(sys.modules), 'stand-ins left behind'"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parents[2])


class _Echo(WorkerBase):
    def process(self, item: int) -> None:
        self.publish_func(item)


class _LateVentilator:
    """Gives the pool its only item between the pool's question about workers and its question about the ventilator."""

    def __init__(self, pool: ThreadPool) -> None:
        self._pool, self._done = pool, False

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def processed_item(self) -> None: ...

    def completed(self) -> bool:
        if not self._done:
            self._done = True
            self._pool.ventilate(7)
        return True


def test_stock_pool_still_loses_data_and_the_strict_one_does_not() -> None:
    """When the first half fails, upstream has cured its race: StrictThreadPool may be no longer needed."""
    stock = ThreadPool(1, 10)
    stock.start(_Echo, ventilator=_LateVentilator(stock))
    with pytest.raises(EmptyResultError):
        stock.get_results()
    stock.stop()
    stock.join()

    strict = StrictThreadPool(1, 10)
    strict.start(_Echo, ventilator=_LateVentilator(strict))
    assert strict.get_results() == 7
    with pytest.raises(EmptyResultError):
        strict.get_results()
    strict.stop()
    strict.join()


def test_200_shuffled_epochs_equal_plain_pyarrow(folder: Path) -> None:
    data_set = DataSet.open(folder)
    groups = len(data_set.file_G)
    addresses = [data_set.address(group) for group in range(groups)]
    plain = [pq.ParquetFile(address.path).read_row_group(address.row_group) for address in addresses]
    assert groups > 8
    for epoch in range(200):
        order = np.random.default_rng(epoch).permutation(groups)
        with RowGroupReader(
            [addresses[group] for group in order],
            data_set.schema(),
            lambda table, index: (index, table),
            threads=1 + epoch % 8,
            ahead=1 + epoch % 5,
        ) as reader:
            read = list(reader)
        assert [index for index, _ in read] == list(range(groups))
        assert all(table.equals(plain[group]) for group, (_, table) in zip(order, read, strict=True))


@pytest.mark.slow
def test_200_shuffled_epochs_of_the_stream_equal_plain_pyarrow(folder: Path) -> None:
    expected = []
    for path in sorted(folder.glob("shard-*.parquet")):
        for row in pq.read_table(path).to_pylist():
            targets = zip(row["target_timestamp"], row["target_split"], row["target_history_end"], strict=True)
            expected += [
                (row["user_id"], when, tuple(row["history_item"][max(0, end - 5) : end]))
                for when, split, end in targets
                if split == 0
            ]
    orders = set()
    for epoch in range(200):
        settings = StreamSettings(batch_size=16, history_length=5, shuffle_memory=2000, threads=1 + epoch % 8)
        with HistoryStream(folder, "train", settings, seed=3, shuffle=True) as stream:
            stream.set_epoch(epoch)
            seen = []
            for batch in stream:
                history = batch.histories["history"]
                for user, when, start, end in zip(
                    batch.user_id_U[batch.user_T].tolist(),
                    batch.timestamp_T.tolist(),
                    history.start_T.tolist(),
                    history.end_T.tolist(),
                    strict=True,
                ):
                    seen.append((user, when, tuple(history.item_M[start:end].tolist())))
        assert sorted(seen) == sorted(expected)
        orders.add(tuple(seen))
    assert len(orders) == 200


def test_reader_that_is_left_early_ends_its_threads(folder: Path) -> None:
    data_set = DataSet.open(folder)
    addresses = [data_set.address(group) for group in range(len(data_set.file_G))] * 20
    before = set(threading.enumerate())
    with RowGroupReader(addresses, data_set.schema(), lambda table, _: table, threads=3, ahead=2) as reader:
        next(reader)
    assert set(threading.enumerate()) == before


class _Trap:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return exec, (f"open({str(self._path)!r}, 'w').close()",)


def test_metadata_is_never_unpickled(tmp_path: Path) -> None:
    trap = pickle.dumps(_Trap(tmp_path / "sprung"))
    # What petastorm does with a data set's metadata, to see that the trap works.
    importlib.import_module("petastorm.etl.legacy").depickle_legacy_package_name_compatible(trap)
    assert (tmp_path / "sprung").exists()
    (tmp_path / "sprung").unlink()

    folder = tmp_path / "data"
    write_dataset(folder, random_users(12))
    schema = DataSet.open(folder).schema().with_metadata({"dataset-toolkit.unischema.v1": trap})
    for name in ("_common_metadata", "_metadata"):
        pq.write_metadata(schema, folder / name)
    rewrite_shard(folder, "shard-00000.parquet", lambda table: table.replace_schema_metadata(schema.metadata))
    with HistoryStream(folder, "train", StreamSettings(), seed=0, shuffle=True) as stream:
        assert sum(len(batch) for batch in stream) == stream.targets
    assert not (tmp_path / "sprung").exists()
