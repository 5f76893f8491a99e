"""The embedded engine: DuckDB, out of core in a folder on disk."""

import errno
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import duckdb
import ibis
import ibis.expr.types as ir
import pyarrow as pa

from pipeline.ingest.engine import ReportLines, ReportShare
from pipeline.ingest.reading import Tally, read_file, schema_of
from pipeline.ingest.shards import ShardBuilder, WrittenShard
from pipeline.ingest.sources import LogFiles
from schemas.errors import UserError

R = TypeVar("R")

_OUTSIDE = 450 << 20
"""Bytes that the process takes beside DuckDB's own buffers and the dictionaries: libraries, the shard at work."""
_LEAST = 150 << 20
"""Bytes below which DuckDB cannot sort."""
_BATCH = 200_000
"""Lines handed over at a time."""


class DuckDBEngine:
    """An `Engine` in this process, which spills to disk what does not fit in memory.

    Args:
        folder: for the database and what is spilled; must exist.
        memory_limit: bytes of the whole process.
        threads: None: one for each core.
    """

    def __init__(self, folder: Path, memory_limit: int, threads: int | None) -> None:
        settings: dict[str, object] = {
            "temp_directory": str(folder / "spill"),
            "memory_limit": f"{memory_limit - _OUTSIDE}B",
            # Nothing here depends on the order of the input, and keeping it would take memory.
            "preserve_insertion_order": False,
            # Logs are read a few times and thrown away: to try all of its codecs on them takes longer than reading.
            "force_compression": "uncompressed",
        }
        if threads is not None:
            settings["threads"] = threads
        self._memory_limit = memory_limit
        self._ibis = self._explained(lambda: ibis.duckdb.connect(folder / "ingest.duckdb", **settings))
        self._connection: duckdb.DuckDBPyConnection = self._ibis.con

    def load(self, files: LogFiles, report: ReportShare) -> tuple[ir.Table, Tally]:
        """Read a log to its end into a table of the database, with the columns of `schema_of`.

        Returns:
            The log, and what became of its lines.

        Raises:
            UserError: a line or file that cannot be read, or the memory or the disk does not suffice.
        """
        tally: Tally = Counter()
        size = max(sum(path.stat().st_size for path in files.paths), 1)
        done = 0
        failure: list[BaseException] = []

        def advance(count: int) -> None:
            nonlocal done
            done += count
            report(min(done / size, 1.0))

        def batches() -> Iterator[pa.RecordBatch]:
            try:
                for index in range(len(files.paths)):
                    yield from read_file(files, index, tally, advance)
            except BaseException as error:
                # DuckDB would tell of it in words of its own.
                failure.append(error)
                raise

        name = f"{files.role}{files.number or ''}_read"
        stream = pa.RecordBatchReader.from_batches(schema_of(files), batches())
        self._connection.register(f"{name}_stream", stream)
        try:
            self._explained(lambda: self._connection.execute(f"CREATE TABLE {name} AS SELECT * FROM {name}_stream"))
        except BaseException:
            if failure:
                raise failure[0] from None
            raise
        finally:
            self._connection.unregister(f"{name}_stream")
        return self._ibis.table(name), tally

    def open_ids(self, path: Path) -> ir.Table:
        """A Parquet file of dense ids that ingest itself has written."""
        return self._ibis.read_parquet(str(path))

    def reserve(self, memory: int) -> None:
        """Lower DuckDB's memory limit by ``memory`` bytes, which the caller needs.

        Raises:
            UserError: DuckDB cannot work with the rest; says how large the limit must be.
        """
        rest = self._memory_limit - _OUTSIDE - memory
        if rest < _LEAST:
            needed = -(-(self._memory_limit - rest + _LEAST) >> 20)
            raise UserError(f"memory_limit is too small for the dictionaries of this input; set at least {needed}MiB")
        self._connection.execute(f"SET memory_limit = '{rest}B'")

    def materialize(self, name: str, table: ir.Table, report: ReportShare) -> ir.Table:
        """Compute ``table`` once and keep the result in the database under ``name``.

        Raises:
            UserError: the memory or the disk does not suffice.
        """
        with _Watched(self._connection, report):
            return self._explained(lambda: self._ibis.create_table(name, table))

    def fetch(self, table: ir.Table) -> pa.Table:
        """Compute an expression and hold its result in memory."""
        return self._explained(lambda: self._ibis.to_pyarrow(table))

    def batches(self, table: ir.Table) -> Iterator[pa.RecordBatch]:
        """Compute an expression and take its rows in order, a few at a time."""
        reader = self._explained(lambda: self._ibis.to_pyarrow_batches(table, chunk_size=_BATCH))
        while (batch := self._explained(lambda: next(reader, None))) is not None:
            yield batch

    def write_shards(
        self, lines: ir.Table, order: list[str], builder: ShardBuilder, report: ReportLines
    ) -> tuple[list[WrittenShard], Tally]:
        """Sort lines by the columns ``order`` and have ``builder`` write them, in this process.

        Returns:
            The files in order of their number, and what became of users, behaviours and impressions.
        """

        def write() -> tuple[list[WrittenShard], Tally]:
            # A stream: DuckDB sorts on disk, and only a few batches are in memory here.
            reader = self._ibis.to_pyarrow_batches(lines.order_by(order), chunk_size=_BATCH)
            with ThreadPoolExecutor(1) as ahead:
                return builder.write(_ahead(reader, ahead), report)

        return self._explained(write)

    def close(self) -> None:
        """Close the database; its files stay until their folder is removed."""
        self._ibis.disconnect()

    def _explained(self, run: Callable[[], R]) -> R:
        """What ``run`` returns; DuckDB's errors become lines for the user."""
        try:
            return run()
        except duckdb.Error as error:
            text = str(error)
            # The second is DuckDB's own limit of what it spills: most of what is free on the disk.
            if "No space left" in text or "max_temp_directory_size" in text:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
            if isinstance(error, duckdb.OutOfMemoryException):
                # The first line says how much was wanted and how much there is; the others are advice on DuckDB's SQL.
                reason = text.splitlines()[0]
                raise UserError(f"memory_limit is too small ({reason}); raise memory_limit or lower threads") from None
            if isinstance(error, duckdb.InterruptException):
                raise KeyboardInterrupt from None
            raise
        except RuntimeError as error:
            # How DuckDB passes on Ctrl-C.
            if "interrupted" in str(error).lower():
                raise KeyboardInterrupt from None
            raise


class _Watched:
    """Reports the progress of the connection's running query from a thread of its own."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, report: ReportShare) -> None:
        self._connection, self._report = connection, report
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            # May be asked from another thread while the connection is busy with the query.
            share = self._connection.query_progress() / 100
            if 0 <= share <= 1:  # It is negative while DuckDB does not know.
                self._report(share)


def _ahead(reader: pa.RecordBatchReader, thread: ThreadPoolExecutor) -> Iterator[pa.RecordBatch]:
    """The reader's batches, the next one fetched while the present one is worked on."""

    def fetch() -> pa.RecordBatch | None:
        return next(reader, None)

    following = thread.submit(fetch)
    while (batch := following.result()) is not None:
        following = thread.submit(fetch)
        yield batch
