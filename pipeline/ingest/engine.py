"""What ingest asks of the program that runs its definition: an embedded engine, or a distributed one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import ibis.expr.types as ir
import pyarrow as pa

from pipeline.ingest.reading import Tally
from pipeline.ingest.shards import ShardBuilder, WrittenShard
from pipeline.ingest.sources import LogFiles

ReportShare = Callable[[float], object]
"""Called with the share of a computation that is done, 0 .. 1."""
ReportLines = Callable[[int], object]
"""Called with the number of lines that are done since the last call."""


class Engine(Protocol):
    """Runs Ibis expressions over logs that may be larger than memory."""

    def load(self, files: LogFiles, report: ReportShare, *, coded: bool) -> tuple[ir.Table, Tally]:
        """Read a log to its end and keep it, with the columns of `pipeline.ingest.reading.schema_of`.

        Args:
            files: the log.
            report: told about progress.
            coded: codes may take the place of texts, see `texts`; the same for all logs.

        Returns:
            The log, and what became of its lines.

        Raises:
            UserError: a line or file that cannot be read.
        """
        ...

    def texts(self, column: str) -> ir.Table | None:
        """(code, text) of every text of a column that has codes; None: it has texts, or no text was read.

        Args:
            column: ``user_id``, ``item_id`` or the column of a feature.
        """
        ...

    def codes(self, column: str, texts: pa.Array) -> pa.Array:
        """What stands in a column in the place of texts, which logs have: codes, or the texts themselves."""
        ...

    def open_ids(self, path: Path) -> ir.Table:
        """A Parquet file of dense ids that ingest itself has written."""
        ...

    def materialize(self, name: str, table: ir.Table, report: ReportShare) -> ir.Table:
        """Compute ``table`` once and keep the result under ``name``."""
        ...

    def reserve(self, memory: int) -> None:
        """From now on leave ``memory`` bytes of the memory limit to the caller.

        Raises:
            UserError: the limit is too small for that.
        """
        ...

    def fetch(self, table: ir.Table) -> pa.Table:
        """Compute an expression and hold its result in memory."""
        ...

    def batches(self, table: ir.Table) -> Iterator[pa.RecordBatch]:
        """Compute an expression and take its rows in order, a few at a time."""
        ...

    def write_shards(
        self,
        lines: ir.Table,
        order: list[str],
        users: ir.Table | None,
        builder: ShardBuilder,
        report: ReportLines,
    ) -> tuple[list[WrittenShard], Tally]:
        """Sort lines by the columns ``order`` and have ``builder`` write them, with texts in the place of codes.

        Args:
            lines: as `definition.in_shards` makes them.
            order: columns.
            users: `definition.user_order`, computed; None: users of lines have no codes.
            builder: writes.
            report: told about progress.

        Returns:
            The files in order of their number, and what became of users, behaviours and impressions.
        """
        ...

    def close(self) -> None:
        """Let go of what the engine holds."""
        ...
