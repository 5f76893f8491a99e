"""A log of behaviours into a store of histories, in bounded memory: each user is written once.

Lines are read as ``dare prepare`` reads them and laid into parts by their users, on the disk of temporary files; then a
part after the other is brought into order. Nothing is written before the whole log has been read.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.files import about
from pipeline.hashing import hash_values
from pipeline.ingest.columns import FEATURE_KEY, feature_column
from pipeline.ingest.counts import check, check_zones
from pipeline.ingest.reading import FILTERED, OUTSIDE_TIME, READ, Tally, read_file, schema_of
from pipeline.ingest.sources import LogFiles, feature_files, log_files
from pipeline.ingest.times import LATEST
from pipeline.progress import stage
from pipeline.serve.history_store import HistoryStore
from pipeline.serve.store import is_store, open_store
from pipeline.serve.stored_columns import Events, StoredColumns, UserId, Value, Values, as_list
from pipeline.upload import scratch_folder
from schemas.errors import UserError
from schemas.prepare import PrepareSettings

_PART_BYTES = 32 << 20
"""Bytes of the log's files that a part is made of, about."""
_MOST_PARTS = 256
"""Parts of which each has an open file."""
_EVENTS = 200_000
"""Events that are written together."""
_USERS = 10_000
"""Users of whom a file says something that are written together."""
_NO_TIMES = np.zeros(0, np.int64)

_LOGGER = logging.getLogger("dare.store")


@dataclass(frozen=True)
class Loaded:
    """What became of the lines of a log."""

    read: int
    filtered: int
    """Have none of the values in ``keep``."""
    outside_time: int
    """Are not from ``since`` to ``until``."""
    users: int
    new: int
    """Are in the store, and were not there."""
    known: int
    """Were there already."""
    not_kept: int
    """Are older than the last N of their user."""
    keep: int
    """N of the store."""
    store_users: int
    """Users in the store."""
    seconds: float


def load_log(url: str, settings: PrepareSettings, keep: int | None = None) -> Loaded:
    """Add the events of a log to a store, or make one of it. The same log again changes nothing.

    A line that comes twice in the log is two events, as in a data set.

    Args:
        url: of the store.
        settings: which files, and how they are read.
        keep: the last so many events of each user; see `open_store`.

    Raises:
        UserError: a file or a line that cannot be read, or a store of other columns; then the store is as it was.
        StoreError: the store is down; what was written until then stays, and the same command goes on.
        OSError: the disk is full.
    """
    began = time.monotonic()
    columns = StoredColumns.of_settings(settings)
    # Before the log is read, which may take long. A store that is not there yet is made of a log that was read.
    if is_store(url):
        open_store(url, columns, keep).close()
    files = log_files("events", settings.events, columns.source_columns, skip_corrupt=settings.on_corrupt == "skip")
    tally: Tally = Counter()
    with scratch_folder() as folder:
        parts = _parted(files, columns, folder, tally)
        check_zones([(settings.events, files, tally)])
        lines = tally[READ] - tally[FILTERED] - tally[OUTSIDE_TIME]
        users = new = known = not_kept = 0
        with open_store(url, columns, keep) as store, stage("write the store", lines, "events") as progress:
            for part in parts:
                for histories in _histories(part, columns):
                    appended = store.merge(histories, repeats=True)
                    users += len(histories)
                    new, known, not_kept = new + appended, known + appended.known, not_kept + appended.not_kept
                    progress.advance(sum(len(events) for _, events in histories))
                part.unlink()
            _load_users(store, settings)
            kept, store_users = store.keep, len(store)
    return Loaded(
        tally[READ],
        tally[FILTERED],
        tally[OUTSIDE_TIME],
        users,
        new,
        known,
        not_kept,
        kept,
        store_users,
        time.monotonic() - began,
    )


def _load_users(store: HistoryStore, settings: PrepareSettings) -> None:
    """Add what files of their own say of users; of a user with several lines, the largest value, as in a data set."""
    columns = {each.file_feature: each for each in store.columns.users if each.file_feature is not None}
    read = [each for each in feature_files(settings) if each.features[0].of == "user"]
    for name in sorted(columns.keys() - {feature.name for each in read for feature in each.features}):
        _LOGGER.info("feature %s of users is in a file of its own, which is not given: it stays as it is", name)
    for each in read:
        (key,) = (column for column in each.files.columns if column.name == FEATURE_KEY)
        files = replace(each.files, columns=(key, *(columns[feature.name].column for feature in each.features)))
        batches = [batch for index in range(len(files.paths)) for batch in read_file(files, index, Counter(), _ignored)]
        names = [feature_column(columns[feature.name].name) for feature in each.features]
        largest = (
            pa.Table.from_batches(batches, schema_of(files))
            .group_by(FEATURE_KEY)
            .aggregate([(name, "max") for name in names])
        )
        if largest[FEATURE_KEY].null_count:
            raise UserError(f"users: {files.paths[0]}: lines have no {key.source}; correct or remove them")
        if pa.types.is_integer(key.type) and len(largest) and pc.min(largest[FEATURE_KEY]).as_py() < 0:
            raise UserError(f"users: {files.paths[0]}: lines have a negative {key.source}; ids are 0 or more")
        for start in range(0, len(largest), _USERS):
            lines = largest.slice(start, _USERS).combine_chunks()
            said = {
                columns[feature.name].name: as_list(columns[feature.name].values(lines[f"{name}_max"].combine_chunks()))
                for feature, name in zip(each.features, names, strict=True)
            }
            store.merge(
                [
                    (user, Events(_NO_TIMES, _no_events(store.columns), _known(said, number)))
                    for number, user in enumerate(lines[FEATURE_KEY].to_pylist())
                ]
            )


def _known(said: dict[str, list[Any]], number: int) -> dict[str, tuple[int | None, Value]]:
    return {name: (None, values[number]) for name, values in said.items() if values[number] is not None}


def _no_events(columns: StoredColumns) -> dict[str, Values]:
    return {column.name: [] for column in columns.behaviors}


def _ignored(_: int) -> None:
    """Files of users are read quickly, and are no progress of the log."""


def _parted(files: LogFiles, columns: StoredColumns, folder: Path, tally: Tally) -> list[Path]:
    """Write the lines of a log into files, all those of a user into one of them, in the order of the log."""
    total = sum(path.stat().st_size for path in files.paths)
    parts = [folder / f"{number}.arrows" for number in range(min(_MOST_PARTS, 1 + total // _PART_BYTES))]
    schema = schema_of(files)
    faults: Counter[str] = Counter()
    first, last = LATEST, 0
    with ExitStack() as opened, stage("read the log", total) as progress, about(folder):
        writers = [opened.enter_context(pa.ipc.new_stream(str(part), schema)) for part in parts]
        for index in range(len(files.paths)):
            for batch in read_file(files, index, tally, progress.advance):
                faults += _faults(batch, columns)
                bounds = pc.min_max(batch["second"])
                first, last = min(first, bounds["min"].as_py() or 0), max(last, bounds["max"].as_py() or 0)
                if not faults.keys() - {"lines"}:
                    _divide(batch, writers)
    counted = {"lines": 0, "impossible_timestamp": 0, **faults, "first": first, "last": last}
    check(files, tally, pa.table({name: [number] for name, number in counted.items()}))
    return parts


def _divide(batch: pa.RecordBatch, writers: list[pa.RecordBatchStreamWriter]) -> None:
    """Write each line to the writer of its user."""
    if len(writers) == 1:
        writers[0].write_batch(batch)
        return
    part_B = hash_values(batch["user"]).to_numpy() % len(writers)
    order = np.argsort(part_B, kind="stable")
    ends = np.searchsorted(part_B[order], np.arange(len(writers)), side="right").tolist()
    batch = batch.take(pa.array(order))
    for writer, start, end in zip(writers, [0, *ends[:-1]], ends, strict=True):
        if end > start:
            writer.write_batch(batch.slice(start, end - start))


def _faults(batch: pa.RecordBatch, columns: StoredColumns) -> Counter[str]:
    """How many ``lines`` there are, and how many have a fault, as `pipeline.ingest.counts.check` calls it."""
    found = Counter(lines=len(batch))
    for name in ("user", feature_column(columns.item), "second"):
        found[f"null_{name}"] = batch[name].null_count
        if name != "second" and pa.types.is_integer(batch[name].type):
            found[f"negative_{name}"] = pc.sum(pc.less(batch[name], 0)).as_py() or 0
    outside = pc.or_(pc.less(batch["second"], 0), pc.greater(batch["second"], LATEST))
    found["impossible_timestamp"] = pc.sum(outside).as_py() or 0
    return found


def _histories(part: Path, columns: StoredColumns) -> Iterator[list[tuple[UserId, Events]]]:
    """Users of a part with all their events, some users at a time."""
    with pa.OSFile(str(part)) as file, pa.ipc.open_stream(file) as reader:
        table = reader.read_all().combine_chunks()
    if not len(table):
        return
    user_B = table["user"].combine_chunks()
    number_B = (user_B.dictionary_encode().indices if pa.types.is_string(user_B.type) else user_B).to_numpy()
    order = np.argsort(number_B, kind="stable")
    start_U = np.flatnonzero(np.diff(number_B[order], prepend=-1))
    end_U = np.append(start_U[1:], len(order))
    first = 0
    while first < len(start_U):
        # As many users as fit, but at least one.
        last = max(first + 1, int(np.searchsorted(end_U, start_U[first] + _EVENTS, side="right")))
        start, end = int(start_U[first]), int(end_U[last - 1])
        lines = table.take(pa.array(order[start:end])).combine_chunks()
        yield _of_users(lines, columns, start_U[first:last] - start, end_U[first:last] - start)
        first = last


def _of_users(
    lines: pa.Table, columns: StoredColumns, start_U: NDArray[np.int64], end_U: NDArray[np.int64]
) -> list[tuple[UserId, Events]]:
    def column(name: str) -> pa.Array:
        return lines[name].combine_chunks()

    second_E = column("second").to_numpy()
    moment_E = column("moment").to_numpy() if "moment" in lines.column_names else second_E
    behaviors = {each.name: each.values(column(each.column.name)) for each in columns.behaviors}
    users = {each.name: each.values(column(each.column.name)) for each in columns.users if each.file_feature is None}
    ids = column("user").take(pa.array(start_U)).to_pylist()
    histories = []
    for user, start, end in zip(ids, start_U.tolist(), end_U.tolist(), strict=True):
        known = {name: _last_known(values[start:end], second_E[start:end]) for name, values in users.items()}
        events = Events(
            moment_E[start:end],
            {name: values[start:end] for name, values in behaviors.items()},
            {name: last for name, last in known.items() if last is not None},
        )
        histories.append((user, events))
    return histories


def _last_known(values: Values, second_E: NDArray[np.int64]) -> tuple[int, Value] | None:
    """The last value that is there, by time, and when that was; the largest text of several of that second."""
    known = [(int(second), value) for second, value in zip(second_E, as_list(values), strict=True) if value is not None]
    return max(known, key=lambda each: (each[0], str(each[1])), default=None)
