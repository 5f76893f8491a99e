"""The stream against plain pyarrow, batches per second, and the room that shards take beside rows of samples.

U = users, M = behaviours of all users, T = targets.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from threading import local
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.ingest.shards import shard_encoding
from pipeline.stream.data_set import DataSet
from pipeline.stream.history_stream import HistoryStream
from pipeline.stream.reader import RowGroupReader
from pipeline.stream.row_group import RowGroup
from schemas.manifest import ROW_GROUP_INDEX, Counts, File, Manifest, Shard, TargetCounts
from schemas.shards import ROW_GROUPS, Split, history_schema
from schemas.storage import sha256
from schemas.stream import StreamSettings

R = TypeVar("R")

POSITIONS, STRIDE, PER_POSITION = 19, 5, 3
"""The paper's training targets: 19 places in a user's history, 5 behaviours apart, a positive and 2 negatives each."""
ITEMS, CATEGORIES = 1_000_000, 10_000
EPOCHS_PER_READ = 2
"""A reading is this many passes over the data set, so that it is long beside the start of threads."""
READS_PER_ROUND = 4
USERS_PER_ROW_GROUP, ROW_GROUPS_PER_SHARD = 256, 16


@dataclass(frozen=True)
class ReaderFigures:
    """What the benchmark measures; rates are medians over the rounds."""

    users: int
    behaviors: int
    targets: int
    threads: int
    rounds: int
    vs_pyarrow: float
    """Rows per second of the petastorm row-group reader over plain pyarrow's: same columns, same threads, in turns."""
    vs_pyarrow_checked: float
    """Row groups read with every value checked and taken out of Arrow's lists, as the stream does in its threads."""
    rows_per_s: float
    pyarrow_rows_per_s: float
    samples_per_s: float
    """Targets per second as batches, all of a user's targets together."""
    samples_per_s_spread: float
    """Targets per second as batches, with at most 3 targets of a user in a batch."""
    samples_per_s_scattered: float
    """Targets per second as batches, with 1 target of a user in a batch: each brings its own N behaviours."""
    storage_vs_samples: float
    """Bytes of one row a target, each with its own N behaviours, in shuffled order, over bytes of the shards."""
    storage_vs_samples_by_user: float
    """This ratio with the rows of a user side by side, where the compressor sees their likeness."""


def measure(users: int, rounds: int, threads: int, history_length: int, batch_size: int) -> ReaderFigures:
    """Write a data set into a temporary folder and measure; progress goes to standard error.

    Args:
        users: users of the data set; about 500 behaviours and 57 targets each.
        rounds: repetitions of each timing.
        threads: reader threads, of both sides.
        history_length: N.
        batch_size: targets a batch.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "data"
        folder.mkdir()
        _say(f"writing {users} users")
        write_dataset(folder, users, seed=0)
        data_set = DataSet.open(folder)
        # In a shuffled order, as training reads.
        order = np.random.default_rng(0).permutation(len(data_set.file_G))
        long_order = np.tile(order, EPOCHS_PER_READ)

        _say("comparing content with plain pyarrow")
        if _digest(read_checked(data_set, order, threads)) != _digest(read_pyarrow(data_set, order, threads)):
            raise RuntimeError("the row-group reader and pyarrow read different content")

        sides: dict[str, Callable[[], None]] = {
            "petastorm": lambda: _exhaust(read_petastorm(data_set, long_order, threads)),
            "pyarrow": lambda: _exhaust(read_pyarrow(data_set, long_order, threads)),
            "checked": lambda: _exhaust(read_checked(data_set, long_order, threads)),
        }
        dealt = np.random.default_rng(0)
        reading: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(rounds):
            _say(f"reading row groups, round {turn + 1} of {rounds}")
            for _ in range(READS_PER_ROUND):
                # In turns and in random order: what else the machine does falls on all sides alike.
                for side in dealt.permutation(list(sides)):
                    reading[side].append(_seconds(sides[side]))
        seconds_of = {side: statistics.median(seconds) for side, seconds in reading.items()}

        samples: dict[int | None, list[float]] = {None: [], 3: [], 1: []}
        for turn in range(rounds):
            for together, seconds in samples.items():
                _say(f"making batches, round {turn + 1} of {rounds}, targets of a user together: {together or 'all'}")
                settings = StreamSettings(
                    batch_size=batch_size,
                    history_length=history_length,
                    threads=threads,
                    targets_per_user_per_batch=together,
                )
                with HistoryStream(folder, "train", settings, seed=turn, shuffle=True) as stream:
                    seconds.append(_seconds(partial(_exhaust, stream)))

        _say("writing rows of samples")
        shuffled, by_user = storage_ratios(data_set, history_length)
        targets = data_set.manifest.counts.train.targets
        per_s = {together: round(targets / statistics.median(seconds)) for together, seconds in samples.items()}
        return ReaderFigures(
            users=users,
            behaviors=data_set.manifest.counts.behaviors,
            targets=targets,
            threads=threads,
            rounds=rounds,
            vs_pyarrow=round(seconds_of["pyarrow"] / seconds_of["petastorm"], 3),
            vs_pyarrow_checked=round(seconds_of["pyarrow"] / seconds_of["checked"], 3),
            rows_per_s=round(EPOCHS_PER_READ * users / seconds_of["petastorm"]),
            pyarrow_rows_per_s=round(EPOCHS_PER_READ * users / seconds_of["pyarrow"]),
            samples_per_s=per_s[None],
            samples_per_s_spread=per_s[3],
            samples_per_s_scattered=per_s[1],
            storage_vs_samples=round(shuffled, 1),
            storage_vs_samples_by_user=round(by_user, 1),
        )


def read_petastorm(data_set: DataSet, order: NDArray[np.int64], threads: int) -> Iterator[pa.Table]:
    """Row groups in ``order`` as petastorm's Reader gives them with our worker and pool."""
    yield from _read(data_set, order, threads, lambda table, _: table)


def read_checked(data_set: DataSet, order: NDArray[np.int64], threads: int) -> Iterator[RowGroup]:
    """Row groups in ``order`` as the stream reads them: flat arrays, every value checked."""
    largest_ids = data_set.largest_ids()
    yield from _read(data_set, order, threads, lambda table, _: RowGroup.from_table(table, largest_ids))


def _read(
    data_set: DataSet, order: NDArray[np.int64], threads: int, convert: Callable[[pa.Table, int], R]
) -> Iterator[R]:
    addresses = [data_set.address(int(group)) for group in order]
    with RowGroupReader(addresses, data_set.schema(), convert, threads=threads, ahead=4 * threads) as reader:
        yield from reader


def read_pyarrow(data_set: DataSet, order: NDArray[np.int64], threads: int) -> Iterator[pa.Table]:
    """Row groups in ``order`` with pyarrow and a pool of threads, each of which opens a file once."""
    opened = local()
    columns = data_set.schema().names

    def read(group: int) -> pa.Table:
        path, row_group, _ = data_set.address(group)
        files = opened.__dict__
        if str(path) not in files:
            files[str(path)] = pq.ParquetFile(path)
        return files[str(path)].read_row_group(row_group, columns, use_threads=False)

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(read, order.tolist())


def storage_ratios(data_set: DataSet, history_length: int) -> tuple[float, float]:
    """Bytes of rows of samples over bytes of shards, for one shard's users: (rows shuffled, rows by user)."""
    shard = data_set.folder / data_set.manifest.shards[0].path
    rows = _sample_rows(RowGroup.from_table(pq.read_table(shard), data_set.largest_ids()), history_length)
    shuffled = rows.take(np.random.default_rng(0).permutation(len(rows)))
    sizes = []
    for table in (shuffled, rows):
        path = data_set.folder / "samples.parquet"
        # As many rows a row group as the shards have targets.
        pq.write_table(
            table, path, row_group_size=len(table) // ROW_GROUPS_PER_SHARD + 1, **shard_encoding(table.schema)
        )
        sizes.append(path.stat().st_size)
        path.unlink()
    return sizes[0] / shard.stat().st_size, sizes[1] / shard.stat().st_size


def _sample_rows(group: RowGroup, history_length: int) -> pa.Table:
    """One row a target: its user, itself, and its own last N behaviours."""
    end_T = group.history_offset_U[:-1][group.user_T] + group.target_T["history_end"]
    length_T = np.minimum(group.target_T["history_end"], history_length).astype(np.int64)
    offset_T = np.concatenate([[0], np.cumsum(length_T)])
    index = np.repeat(end_T - length_T - offset_T[:-1], length_T) + np.arange(offset_T[-1])
    columns = {"user_id": pa.array(group.user_id_U[group.user_T])}
    for name, column_M in group.history_M.items():
        columns[f"history_{name}"] = pa.LargeListArray.from_arrays(offset_T, pa.array(column_M[index]))
    for name in ("item", "category", "timestamp", "label", "split"):
        columns[f"target_{name}"] = pa.array(group.target_T[name])
    return pa.table(columns)


def write_dataset(folder: Path, users: int, seed: int) -> None:
    """Users of 250 to 750 behaviours, Zipf-like items, an hour between behaviours, the paper's training targets."""
    rng = np.random.default_rng(seed)
    schema = history_schema(behavior=False, scene=False)
    category_I = rng.integers(1, CATEGORIES + 1, ITEMS + 1).astype(np.int32)
    shards, index = [], []
    behaviors = targets = 0
    for number, first in enumerate(range(0, users, USERS_PER_ROW_GROUP * ROW_GROUPS_PER_SHARD)):
        path = folder / f"shard-{number:05}.parquet"
        last = min(users, first + USERS_PER_ROW_GROUP * ROW_GROUPS_PER_SHARD)
        rows: list[int] = []
        with pq.ParquetWriter(path, schema, **shard_encoding(schema)) as writer:
            for begin in range(first, last, USERS_PER_ROW_GROUP):
                table = _users(rng, np.arange(begin, min(last, begin + USERS_PER_ROW_GROUP)), category_I, schema)
                writer.write_table(table)
                held = pc.sum(pc.list_value_length(table["history_item"])).as_py()
                shown = len(table) * POSITIONS * PER_POSITION
                index.append([number, len(rows), len(table), held, shown, 0, 0])
                rows.append(held)
        behaviors += sum(rows)
        targets += (last - first) * POSITIONS * PER_POSITION
        shards.append(Shard(**_file(path), users=last - first, behaviors=sum(rows), row_groups=len(rows)))
    columns = [pa.array(column, field.type) for column, field in zip(zip(*index, strict=True), ROW_GROUPS, strict=True)]
    pq.write_table(pa.table(columns, schema=ROW_GROUPS), folder / ROW_GROUP_INDEX)
    nothing = TargetCounts(targets=0, positives=0)
    Manifest(
        schema_version=2,
        seed=seed,
        counts=Counts(
            events=behaviors,
            users=users,
            users_left_out=0,
            behaviors=behaviors,
            items=ITEMS,
            categories=CATEGORIES,
            items_with_changed_category=0,
            first_timestamp=0,
            last_timestamp=0,
            train=TargetCounts(targets=targets, positives=targets // PER_POSITION),
            validation=nothing,
            test=nothing,
        ),
        behaviors=None,
        scenes=None,
        settings={},
        sources=(),
        shards=tuple(shards),
        files=(File(**_file(folder / ROW_GROUP_INDEX)),),
    ).write(folder)


def _users(
    rng: np.random.Generator, user_id_U: NDArray[np.int64], category_I: NDArray[np.int32], schema: pa.Schema
) -> pa.Table:
    """A row group of users."""
    length_U = rng.integers(250, 751, len(user_id_U))
    offset_U = np.concatenate([[0], np.cumsum(length_U)])
    item_M = _items(rng, int(offset_U[-1]))
    # Behaviours are numbered through over users here; only differences within a user matter.
    timestamp_M = 1_500_000_000 + np.cumsum(rng.exponential(3600, len(item_M)).astype(np.int64) + 1)
    # Of T behaviours, target j is number T - 2 - 5 j, counted from 1; the behaviours before it are its history.
    end_UJ = length_U[:, None] - 3 - STRIDE * np.arange(POSITIONS)[::-1]
    end_T = np.repeat(end_UJ.reshape(-1), PER_POSITION)
    # A positive is the behaviour at its place, its negatives are drawn like any item.
    place_T = np.repeat(offset_U[:-1], POSITIONS * PER_POSITION) + end_T
    label_T = np.tile(np.arange(PER_POSITION) == 0, len(end_T) // PER_POSITION)
    item_T = np.where(label_T, item_M[place_T], _items(rng, len(place_T)))
    values = {
        "history_item": item_M,
        "history_category": category_I[item_M],
        "history_timestamp": timestamp_M,
        "target_item": item_T,
        "target_category": category_I[item_T],
        "target_timestamp": timestamp_M[place_T],
        "target_label": label_T.astype(np.int8),
        "target_split": np.full(len(end_T), Split.TRAIN, np.int8),
        "target_history_end": end_T.astype(np.int32),
    }
    offsets = {"history": offset_U, "target": np.arange(len(user_id_U) + 1) * POSITIONS * PER_POSITION}
    columns = [
        pa.array(user_id_U)
        if field.name == "user_id"
        else pa.ListArray.from_arrays(
            pa.array(offsets[field.name.split("_")[0]], pa.int32()), pa.array(values[field.name]), type=field.type
        )
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _items(rng: np.random.Generator, count: int) -> NDArray[np.int32]:
    """Items with frequencies like 1 / rank, ids unrelated to frequency."""
    rank = np.exp(rng.random(count) * np.log(ITEMS)).astype(np.int64)
    items: NDArray[np.int32] = (rank * 7_368_787 % ITEMS + 1).astype(np.int32)
    return items


def _file(path: Path) -> dict[str, Any]:
    return {"path": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}


def _digest(row_groups: Iterator[RowGroup] | Iterator[pa.Table]) -> list[int]:
    """Sums of each row group's values weighted by their index: tells if anything is lost, doubled or out of order."""
    sums = []
    for group in row_groups:
        if isinstance(group, RowGroup):
            columns = [group.user_id_U, *group.history_M.values(), *group.target_T.values()]
        else:
            columns = [
                (column.combine_chunks().flatten() if pa.types.is_list(column.type) else column).to_numpy()
                for column in group.columns
            ]
        sums.append(sum(int(column.astype(np.int64) @ np.arange(1, len(column) + 1)) % 2**61 for column in columns))
    return sums


def _exhaust(items: Iterator[Any] | HistoryStream) -> None:
    for _ in items:
        pass


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def as_dict(figures: ReaderFigures) -> dict[str, float]:
    """The figures as JSON has them."""
    return asdict(figures)
