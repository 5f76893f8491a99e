"""A day added to a chain, which reads the histories of its own users alone, against preparing the whole log anew.

E = events, U = users.
"""

import os
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.hashing import mix
from pipeline.ingest.chain import Base
from pipeline.ingest.day_settings import day_settings
from pipeline.ingest.prepare import prepare
from schemas.manifest import Manifest
from schemas.prepare import PrepareSettings

START = 1_500_000_000
BETWEEN = 50_000
"""Seconds between a user's behaviours, at most twice that: no two are of one second."""
EVENTS_OF_AN_ITEM = 5
CATEGORIES = 9_400
BLOCK = 1_000_000
"""Events that are made at a time."""


@dataclass(frozen=True)
class Cost:
    """What a preparation costs, without the start of its process."""

    seconds: float
    cpu_s: float
    read_mib: float
    """Read from the disk; its files were not in memory before."""
    written_mib: float
    """Written, with what was spilled and removed again."""
    output_mib: float
    """Of its data set's files, without links to those of another one."""
    peak_mib: int


@dataclass(frozen=True)
class ExtendFigures:
    """A day of so many users, added to a chain, and prepared anew with all that was before."""

    users: int
    """Of the day before, each with as many behaviours."""
    touched_share: float
    touched_users: int
    day_events: int
    carried: int
    """Behaviours that the day has taken from those before."""
    extend: Cost
    anew: Cost
    times_faster: float
    times_less_cpu: float


def measure(
    users: int, behaviors: int, of_day: int, shares: tuple[float, ...], memory_limit: str = "3GiB"
) -> list[ExtendFigures]:
    """Add days that differ in their number of users to one data set, and prepare everything anew, by turns.

    Both have the same histories, or there are no figures.

    Args:
        users: of the first day.
        behaviors: of each of them.
        of_day: events of a day's user.
        shares: of the users who have events on a day.
        memory_limit: of ``dare prepare``.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = {
            "split": {"kind": "paper", "min_behaviors": 1},
            "history": {"keep": behaviors},
            "memory_limit": memory_limit,
        }
        items = max(users * behaviors // EVENTS_OF_AN_ITEM, 100)
        _write_log(folder / "before.parquet", np.arange(users), behaviors, 0, items)
        _measured([folder / "before.parquet"], settings, folder / "base", None)
        figures = []
        for number, share in enumerate(shares):
            touched = np.sort(np.argsort(mix(np.arange(users), number))[: max(1, round(share * users))])
            log = folder / "day.parquet"
            _write_log(log, touched, of_day, behaviors, items)
            day, whole = folder / "day", folder / "whole"
            extend = _measured([log], settings, day, folder / "base")
            anew = _measured([folder / "before.parquet", log], settings, whole, None)
            _check(day, whole, touched)
            manifest = Manifest.read(day)
            figures.append(
                ExtendFigures(
                    users,
                    share,
                    len(touched),
                    len(touched) * of_day,
                    manifest.counts.behaviors_carried,
                    extend,
                    anew,
                    round(anew.seconds / extend.seconds, 1),
                    round(anew.cpu_s / extend.cpu_s, 1),
                )
            )
        return figures


def _measured(logs: list[Path], settings: dict[str, Any], out: Path, base: Path | None) -> Cost:
    """Prepare in a process of its own, whose files are all on the disk and not in memory."""
    os.sync()
    for path in [*logs, *(base.iterdir() if base is not None else [])]:
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        cost = pool.submit(_prepare, logs, settings, out, base).result()
    own = sum(path.stat().st_size for path in out.iterdir() if path.stat().st_nlink == 1)
    return replace(cost, output_mib=round(own / 2**20, 1))


def _prepare(logs: list[Path], settings: dict[str, Any], out: Path, base: Path | None) -> Cost:
    events = {"events": {"files": [str(path) for path in logs]}}
    former = None if base is None else Base.open(base, closed=False)
    if former is None:
        whole = PrepareSettings.model_validate(settings | events)
    else:
        whole = day_settings(former, values=events | {"memory_limit": settings["memory_limit"]})
    before, started, cpu = _bytes(), time.monotonic(), time.process_time()
    prepare(whole, out, base=former, overwrite=True)
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    after = _bytes()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    read, written = (round((after[name] - before[name]) / 2**20, 1) for name in ("read_bytes", "write_bytes"))
    return Cost(round(seconds, 2), round(cpu, 2), read, written, 0.0, peak)


def _bytes() -> dict[str, int]:
    """What Linux says of this process's bytes from and to disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(number) for name, _, number in (line.partition(": ") for line in lines)}


def _write_log(path: Path, user_U: NDArray[np.int64], of_each: int, first: int, items: int) -> None:
    """Write behaviours number ``first`` .. ``first + of_each`` of each user, with items as in `benchmarks.ingest`."""
    step = max(1, BLOCK // of_each)
    writer = None
    for start in range(0, len(user_U), step):
        user_E = np.repeat(user_U[start : start + step], of_each)
        number_E = np.tile(np.arange(first, first + of_each), len(user_E) // of_each)
        drawn_E = mix(user_E * np.int64(1 << 20) + number_E, 1)
        item_E = (items * (mix(drawn_E, 2) / np.float64(2**64)) ** 3).astype(np.int64)
        table = pa.table(
            {
                "user_id": user_E,
                "item_id": item_E,
                "category_id": (mix(item_E, 3) % np.uint64(CATEGORIES)).astype(np.int64),
                "timestamp": START + number_E * BETWEEN + (drawn_E % np.uint64(BETWEEN)).astype(np.int64),
            }
        )
        # Mixed as logs are: by time, not by user.
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table.sort_by("timestamp"))
    assert writer is not None
    writer.close()


def _check(day: Path, whole: Path, touched: NDArray[np.int64]) -> None:
    """Make sure that both have the same histories of the day's users, as raw items."""
    here, there = _histories(day, touched), _histories(whole, touched)
    for name in here:
        assert np.array_equal(here[name], there[name]), f"{name} differ"


def _histories(folder: Path, touched: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Users, times and raw items of all behaviours of the touched users, in one order."""
    items = pq.read_table(folder / "items.parquet", columns=["raw_id", "id"])
    raw = np.empty(len(items) + 1, np.int64)
    raw[items["id"].to_numpy()] = items["raw_id"].to_numpy()
    parts = []
    for shard in Manifest.read(folder).shards:
        table = pq.read_table(folder / shard.path, columns=["user_id", "history_item", "history_timestamp"])
        table = table.filter(pa.array(np.isin(table["user_id"].to_numpy(), touched))).combine_chunks()
        lists = table["history_item"].combine_chunks()
        parts.append(
            (
                np.repeat(table["user_id"].to_numpy(), lists.value_lengths().to_numpy()),
                table["history_timestamp"].combine_chunks().flatten().to_numpy(),
                raw[lists.flatten().to_numpy()],
            )
        )
    user_E, timestamp_E, item_E = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((item_E, timestamp_E, user_E))
    assert np.array_equal(np.unique(user_E), touched), "all of the day's users are there"
    return {"users": user_E[order], "times": timestamp_E[order], "items": item_E[order]}
