"""The embedded engine: DuckDB, out of core in a folder on disk."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import duckdb
import ibis
import ibis.expr.types as ir
import pyarrow as pa

from pipeline.ingest.engine import Progress
from pipeline.ingest.faults import csv_options, explain, refuse_fractions
from pipeline.ingest.shards import ShardBuilder, Written
from pipeline.ingest.sources import Files
from schemas.errors import UserError

R = TypeVar("R")

_OUTSIDE = 450 << 20
"""Bytes that the process takes beside DuckDB's own buffers and the dictionaries: libraries, the shard at work."""
_LEAST = 150 << 20
"""Bytes below which DuckDB cannot sort."""
_BATCH = 200_000
"""Lines handed over at a time."""


class DuckDBEngine:
    """See ``Engine``.

    Args:
        folder: for the database and what does not fit in memory; must exist.
        memory_limit: bytes of the whole process.
        threads: None: one for each core.
    """

    def __init__(self, folder: Path, memory_limit: int, threads: int | None) -> None:
        settings: dict[str, object] = {
            "temp_directory": str(folder / "spill"),
            "memory_limit": f"{memory_limit - _OUTSIDE}B",
            "preserve_insertion_order": False,
        }
        if threads is not None:
            settings["threads"] = threads
        self._ibis = ibis.duckdb.connect(folder / "ingest.duckdb", **settings)
        self._connection: duckdb.DuckDBPyConnection = self._ibis.con
        self._files: list[Files] = []
        self._memory_limit = memory_limit

    def read(self, files: Files) -> ir.Table:
        """See ``Engine.read``."""
        self._files.append(files)
        paths = [str(path) for path in files.paths]
        if files.format == "parquet":
            return self._ibis.read_parquet(paths).select(*files.columns)
        refuse_fractions(files)
        # DuckDB opens CSV files at once, so a fault in the first lines shows here.
        return self._told(lambda: self._ibis.read_csv(paths, **csv_options(files)))

    def open(self, path: Path) -> ir.Table:
        """See ``Engine.open``."""
        return self._ibis.read_parquet(str(path))

    def leave(self, memory: int) -> None:
        """See ``Engine.leave``."""
        rest = self._memory_limit - _OUTSIDE - memory
        if rest < _LEAST:
            needed = -(-(self._memory_limit - rest + _LEAST) >> 20)
            raise UserError(f"memory_limit is too small for the dictionaries of this input; set at least {needed}MiB")
        self._connection.execute(f"SET memory_limit = '{rest}B'")

    def keep(self, name: str, table: ir.Table, progress: Progress) -> ir.Table:
        """See ``Engine.keep``."""
        with _Watched(self._connection, progress):
            return self._told(lambda: self._ibis.create_table(name, table))

    def fetch(self, table: ir.Table) -> pa.Table:
        """See ``Engine.fetch``."""
        return self._told(lambda: self._ibis.to_pyarrow(table))

    def write_shards(
        self, lines: ir.Table, order: list[str], builder: ShardBuilder, progress: Callable[[int], object]
    ) -> tuple[list[Written], int]:
        """See ``Engine.write_shards``."""

        def write() -> tuple[list[Written], int]:
            reader = self._ibis.to_pyarrow_batches(lines.order_by(order), chunk_size=_BATCH)
            with ThreadPoolExecutor(1) as ahead:
                return builder.write(_ahead(reader, ahead), progress)

        return self._told(write)

    def close(self) -> None:
        """See ``Engine.close``."""
        self._ibis.disconnect()

    def _told(self, run: Callable[[], R]) -> R:
        try:
            return run()
        except duckdb.OutOfMemoryException as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"memory_limit is too small ({reason}); raise memory_limit or lower threads") from None
        except duckdb.Error as error:
            raise UserError(explain(error, self._files)) from None
        except RuntimeError as error:
            # How DuckDB passes on Ctrl-C.
            if "interrupted" in str(error).lower():
                raise KeyboardInterrupt from None
            raise


class _Watched:
    """Reports the progress of the connection's running query from a thread of its own."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, progress: Progress) -> None:
        self._connection, self._progress = connection, progress
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            share = self._connection.query_progress() / 100
            if 0 <= share <= 1:
                self._progress(share)


def _ahead(reader: pa.RecordBatchReader, thread: ThreadPoolExecutor) -> Iterator[pa.RecordBatch]:
    """The reader's batches, the next one fetched while the present one is worked on."""

    def fetch() -> pa.RecordBatch | None:
        return next(reader, None)

    following = thread.submit(fetch)
    while (batch := following.result()) is not None:
        following = thread.submit(fetch)
        yield batch
