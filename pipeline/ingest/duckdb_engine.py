"""The embedded engine: DuckDB, in memory as far as the limit goes, and beyond it in a folder on disk."""

import errno
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import duckdb
import ibis
import ibis.expr.types as ir
import pyarrow as pa

from pipeline.ingest.columns import USER_NUMBER
from pipeline.ingest.definition import USER_ORDER
from pipeline.ingest.engine import ReportLines, ReportShare
from pipeline.ingest.reading import Tally, ahead, read_file, schema_of, text_column
from pipeline.ingest.shards import ShardBuilder, WrittenShard
from pipeline.ingest.sources import LogFiles
from pipeline.ingest.text_codes import SCHEMA, TextCodes
from schemas.errors import UserError

R = TypeVar("R")

_OUTSIDE = 450 << 20
"""Bytes that the process takes beside DuckDB's own buffers and the dictionaries: libraries, the shard at work."""
_CODING = 150 << 20
"""Bytes that it takes besides where texts get codes: for the compiler of what hashes them, and to remember texts."""
_LEAST = 150 << 20
"""Bytes below which DuckDB cannot sort."""
_BATCH = 200_000
"""Lines handed over at a time."""
_USERS = 100_000
"""Texts of users that are fetched at a time."""


class DuckDBEngine:
    """An `Engine` in this process, which spills to disk what does not fit in memory.

    Args:
        folder: for texts and for what is spilled; must exist.
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
        self._memory_limit, self._outside = memory_limit, _OUTSIDE
        # No file: nothing of it is to outlive this process, and writing all of it takes longer than spilling some.
        self._ibis = self._explained(lambda: ibis.duckdb.connect(**settings))
        self._connection: duckdb.DuckDBPyConnection = self._ibis.con
        self._codes = TextCodes(folder)
        self._have_texts = set[str]()
        """Columns that have a table of texts."""

    def load(self, files: LogFiles, report: ReportShare, *, coded: bool) -> tuple[ir.Table, Tally]:
        """Read a log to its end into a table of the database, with the columns of `schema_of`.

        Args:
            files: the log.
            report: told about progress.
            coded: codes take the place of texts, which stand in tables of their own.

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
                    yield from read_file(files, index, tally, advance, self._codes if coded else None)
            except BaseException as error:
                # DuckDB would tell of it in words of its own.
                failure.append(error)
                raise

        columns = {text_column(files, column.name) for column in files.columns if column.coded} - {USER_NUMBER}
        if coded and columns and self._outside == _OUTSIDE:
            self._outside += _CODING
            self.reserve(0)
        name = f"{files.role}{files.number or ''}_read"
        stream = pa.RecordBatchReader.from_batches(schema_of(files, coded=coded), batches())
        self._connection.register(f"{name}_stream", stream)
        try:
            self._explained(lambda: self._connection.execute(f"CREATE TABLE {name} AS SELECT * FROM {name}_stream"))
        except BaseException:
            if failure:
                raise failure[0] from None
            raise
        finally:
            self._connection.unregister(f"{name}_stream")
        if coded and not self._explained(lambda: self._keep_texts(sorted(columns))):
            # Once more, with a code of its own for each text.
            self._connection.execute(f"DROP TABLE {name}")
            return self.load(files, report, coded=coded)
        return self._ibis.table(name), tally

    def _keep_texts(self, columns: list[str]) -> bool:
        """Keep the texts that a log has brought, unless some share a code: these have other codes from now on."""
        run, paths = self._connection.execute, self._codes.finish()
        distinct = True
        for column in columns:
            run(f"CREATE TABLE IF NOT EXISTS {_texts(column)} (code BIGINT, text VARCHAR)")
            with _opened(paths.get(column)) as read:
                self._connection.register("texts_read", read)
                both = f"(FROM texts_read UNION ALL FROM {_texts(column)})"
                run(f"CREATE TABLE {_texts(column, new=True)} AS SELECT DISTINCT code, text FROM {both}")
                self._connection.unregister("texts_read")
            distinct = self._codes_differ(column) and distinct
        for column in columns:
            if distinct:
                run(f"DROP TABLE {_texts(column)}")
                run(f"ALTER TABLE {_texts(column, new=True)} RENAME TO {_texts(column)}")
            else:
                run(f"DROP TABLE {_texts(column, new=True)}")
        for path in paths.values():
            path.unlink()
        self._have_texts.update(columns)
        if not distinct:
            self._codes.forget()
        return distinct

    def _codes_differ(self, column: str) -> bool:
        """Whether no two texts of a column share a code; of those that do, all but one are given the next code."""
        run, new = self._connection.execute, _texts(column, new=True)
        ((texts, codes),) = run(f"SELECT count(*), count(DISTINCT code) FROM {new}").fetchall()
        if texts == codes:
            return True
        shared = f"SELECT code FROM {new} GROUP BY code HAVING count(*) > 1"
        # That of an earlier log keeps its code: it stands there.
        kept = dict(run(f"FROM {_texts(column)} WHERE code IN ({shared})").fetchall())
        for code, text in run(f"FROM {new} WHERE code IN ({shared}) ORDER BY code, text").fetchall():
            if kept.setdefault(code, text) != text:
                self._codes.move(column, text, code)
        return False

    def texts(self, column: str) -> ir.Table | None:
        """(code, text) of every text of a column that was read; None: it has no texts."""
        return self._ibis.table(_texts(column)) if column in self._have_texts else None

    def codes(self, column: str, texts: pa.Array) -> pa.Array:
        """What stands in a column in the place of texts: codes, or themselves where the column has none."""
        return texts if self.texts(column) is None else self._codes.code(column, texts, written=True)

    def open_ids(self, path: Path) -> ir.Table:
        """A Parquet file of dense ids that ingest itself has written."""
        return self._ibis.read_parquet(str(path))

    def reserve(self, memory: int) -> None:
        """Lower DuckDB's memory limit by ``memory`` bytes, which the caller needs.

        Raises:
            UserError: DuckDB cannot work with the rest; says how large the limit must be.
        """
        rest = self._memory_limit - self._outside - memory
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
        self,
        lines: ir.Table,
        order: list[str],
        users: ir.Table | None,
        builder: ShardBuilder,
        report: ReportLines,
    ) -> tuple[list[WrittenShard], Tally]:
        """Sort lines by the columns ``order`` and have ``builder`` write them, in this process.

        Returns:
            The files in order of their number, and what became of users, behaviours and impressions.
        """

        def write() -> tuple[list[WrittenShard], Tally]:
            # A stream: DuckDB sorts on disk, and only a few batches are in memory here.
            batches: Iterable[pa.RecordBatch] = self._ibis.to_pyarrow_batches(lines.order_by(order), chunk_size=_BATCH)
            if users is not None:
                # By a connection of its own: one has one stream at a time.
                texts = str(ibis.to_sql(users.order_by(USER_ORDER).select("text"), dialect="duckdb"))
                batches = _with_users(batches, self._connection.cursor().execute(texts).to_arrow_reader(_USERS))
            return builder.write(ahead(iter(batches)), report)

        return self._explained(write)

    def close(self) -> None:
        """Close the database; files of what was spilled stay until their folder is removed."""
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


def _texts(column: str, *, new: bool = False) -> str:
    """Name of the table (code, text) of a column; of the one that is to take its place."""
    return f"{'new_' if new else ''}texts_of_{column}"


@contextmanager
def _opened(path: Path | None) -> Iterator[pa.RecordBatchReader]:
    """The texts in a file of `TextCodes`; None: none."""
    if path is None:
        yield pa.RecordBatchReader.from_batches(SCHEMA, [])
        return
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        yield reader


def _with_users(lines: Iterable[pa.RecordBatch], texts: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    """Lines with texts in the place of `USER_ORDER`, which counts ``texts``."""
    held, first = pa.nulls(0, pa.string()), 0
    for batch in lines:
        order_L = batch[USER_ORDER].to_numpy()
        while first + len(held) <= order_L[-1]:
            # Both go upwards: what lies before the batch is needed no more.
            gone = min(int(order_L[0]) - first, len(held))
            held, first = pa.concat_arrays([held[gone:], next(texts)["text"]]), first + gone
        text_L = held.take(pa.array(order_L - first))
        yield batch.drop_columns([USER_ORDER]).append_column("user_id", text_L)
