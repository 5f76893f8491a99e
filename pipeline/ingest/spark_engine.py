"""The distributed engine: Spark, for logs that outgrow one machine.

Input, output and work folders must be visible to all executors, and this project installed there. Where Spark's own
configuration names no master, it runs on this machine.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
import pyarrow as pa

from pipeline.ingest.engine import ReportLines, ReportShare
from pipeline.ingest.faults import first_fault
from pipeline.ingest.shards import ShardBuilder, WrittenShard
from pipeline.ingest.sources import LogFiles
from schemas.errors import UserError

try:
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException
    from pyspark.sql import DataFrame, SparkSession
except ImportError:
    raise UserError("engine=spark needs pyspark and Java: pip install --no-deps -r requirements/spark.txt") from None

_TYPES = {"int64": "BIGINT", "string": "STRING", "timestamp": "TIMESTAMP"}
_BATCH = 500_000
"""Lines handed to the shard builder at a time."""


class SparkEngine:
    """An `Engine` that runs on a cluster, or on this machine where Spark's configuration names no other master.

    Args:
        folder: for tables that are kept; must exist.
        memory_limit: bytes of the driver; without a cluster it does all the work.
        threads: of a local master; None: one for each core.
    """

    def __init__(self, folder: Path, memory_limit: int, threads: int | None) -> None:
        builder = SparkSession.builder.appName("dare prepare")
        if threads is not None:
            builder = builder.master(f"local[{threads}]")
        settings = {
            # FAILFAST counts a line's columns only if none is pruned.
            "spark.sql.csv.parser.columnPruning.enabled": "false",
            "spark.driver.memory": f"{memory_limit >> 20}m",
            "spark.log.level": "OFF",
            "spark.sql.execution.arrow.maxRecordsPerBatch": str(_BATCH),
            # Dates of a log have no zone: both engines must read them alike, wherever they run.
            "spark.sql.session.timeZone": "UTC",
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
        }
        for name, value in settings.items():
            builder = builder.config(name, value)
        self._folder = folder
        self._session = builder.getOrCreate()
        self._ibis = ibis.pyspark.connect(self._session)
        self._files: list[LogFiles] = []

    def read(self, files: LogFiles) -> ir.Table:
        """The log in ``files``, each needed column in its type; faults show when the expression is computed."""
        self._files.append(files)
        # Executors have working directories of their own.
        paths = [str(path.absolute()) for path in files.paths]
        if files.format == "parquet":
            frame = self._session.read.parquet(*paths).select(*files.columns)
        else:
            frame = self._session.read.csv(
                paths,
                schema=", ".join(f"`{name}` {_TYPES[kind]}" for name, kind in files.columns.items()),
                header=files.header,
                sep=files.delimiter,
                quote='"',
                escape='"',
                mode="FAILFAST",
            )
        return self._view(files.role + "_files", frame)

    def open_ids(self, path: Path) -> ir.Table:
        """A Parquet file of dense ids that ingest itself has written."""
        return self._view(path.stem + "_ids", self._session.read.parquet(str(path.absolute())))

    def materialize(self, name: str, table: ir.Table, report: ReportShare) -> ir.Table:
        """Compute ``table`` once and keep the result as Parquet files under ``name``; nothing is reported meanwhile.

        Raises:
            UserError: a line or file of the input cannot be read.
        """
        path = str((self._folder / f"{name}.parquet").absolute())
        self._explained(lambda: self._frame(table).write.parquet(path))
        return self._view(name, self._session.read.parquet(path))

    def reserve(self, memory: int) -> None:
        """Do nothing: the executors' memory is that of other processes."""

    def fetch(self, table: ir.Table) -> pa.Table:
        """Compute an expression and hold its result in the memory of the driver."""
        # Spark has its own idea of nullability and widths; ingest goes on with the types of the definition.
        result = self._explained(lambda: self._frame(table).toArrow())
        return result.cast(table.schema().to_pyarrow())

    def write_shards(
        self, lines: ir.Table, order: list[str], builder: ShardBuilder, report: ReportLines
    ) -> tuple[list[WrittenShard], int]:
        """Sort lines by the columns ``order`` and have the executors write them, each whole shards.

        Returns:
            The files in order of their number, and how many users were seen.
        """
        # The builder holds the dictionaries: sent once to each executor, not with every task.
        shared = self._session.sparkContext.broadcast(builder)

        def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            files, users = shared.value.write(batches)
            yield pa.RecordBatch.from_pydict(
                {"files": [json.dumps([asdict(file) for file in files])], "users": [users]}
            )

        # All lines of a shard come to one task. A task may have several shards, one after the other: user keys sort
        # them.
        frame = self._frame(lines).repartition("shard").sortWithinPartitions(*order)
        parts = self._explained(lambda: frame.mapInArrow(write, "files string, users bigint").toArrow()).to_pylist()
        files = [WrittenShard(**file) for part in parts for file in json.loads(part["files"])]
        report(sum(sum(file.behaviors) for file in files))
        return sorted(files, key=lambda file: file.name), sum(part["users"] for part in parts)

    def close(self) -> None:
        """End the session."""
        self._session.stop()

    def _view(self, name: str, frame: DataFrame) -> ir.Table:
        frame.createOrReplaceTempView(name)
        return self._ibis.table(name)

    def _frame(self, table: ir.Table) -> DataFrame:
        return self._session.sql(str(ibis.to_sql(table, dialect="pyspark")))

    def _explained(self, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except (PySparkException, Py4JError) as error:
            # Spark's words name neither file nor line: look for the fault with the embedded engine.
            fault = next((fault for files in self._files if (fault := first_fault(files)) is not None), None)
            text = str(error).strip().splitlines()
            raise UserError(fault or (text or [type(error).__name__])[0]) from None
