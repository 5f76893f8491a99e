"""The distributed engine: Spark, for logs that outgrow one machine.

Input, output and work folders must be visible to all executors, and this project installed there. Where Spark's own
configuration names no master, it runs on this machine.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import error_line
from pipeline.files import whole_file
from pipeline.ingest.engine import ReportLines, ReportShare
from pipeline.ingest.reading import Tally, read_file, schema_of
from pipeline.ingest.shards import ShardBuilder, WrittenShard
from pipeline.ingest.sources import LogFiles
from schemas.errors import UserError

try:
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException
    from pyspark.sql import DataFrame, SparkSession
except ImportError:
    raise UserError("engine=spark needs pyspark and Java: pip install --no-deps -r requirements/spark.txt") from None

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

    def load(self, files: LogFiles, report: ReportShare, *, coded: bool) -> tuple[ir.Table, Tally]:
        """Have the executors read a log, a file a task, and keep it as Parquet files; nothing is reported meanwhile.

        Texts stay texts, ``coded`` or not.

        Returns:
            The log, and what became of its lines.

        Raises:
            UserError: a line or file that cannot be read; of several the first, in the order of files.
        """
        name = f"{files.role}{files.number or ''}_read"
        folder = (self._folder / f"{name}.parquet").absolute()
        folder.mkdir()
        # Executors have working directories of their own.
        shared = self._session.sparkContext.broadcast(
            replace(files, paths=tuple(path.absolute() for path in files.paths))
        )

        def read(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for index in (number for batch in batches for number in batch["id"].to_pylist()):
                tally: Tally = Counter()
                fault = None
                try:
                    # A task may be tried twice: what the first try has left is written over.
                    with (
                        whole_file(folder / f"part-{index:05}.parquet") as path,
                        pq.ParquetWriter(path, schema_of(shared.value)) as writer,
                    ):
                        for part in read_file(shared.value, index, tally, lambda _: None):
                            writer.write_batch(part)
                except (UserError, OSError) as error:
                    if (fault := error_line(error)) is None:
                        raise
                yield pa.RecordBatch.from_pydict(
                    {"file": [index], "tally": [json.dumps(tally)], "fault": pa.array([fault], pa.string())}
                )

        if not files.paths:
            pq.write_table(schema_of(files).empty_table(), folder / "part-none.parquet")
        tasks = self._session.range(0, len(files.paths), 1, max(1, len(files.paths)))
        frame = tasks.mapInArrow(read, "file bigint, tally string, fault string")
        parts = sorted(self._explained(frame.toArrow).to_pylist(), key=lambda part: part["file"])
        if fault := next((part["fault"] for part in parts if part["fault"]), None):
            raise UserError(fault)
        report(1.0)
        return self._view(name, self._session.read.parquet(str(folder))), _together(parts)

    def texts(self, column: str) -> None:
        """None: columns have texts here."""

    def codes(self, column: str, texts: pa.Array) -> pa.Array:
        """The texts."""
        return texts

    def open_ids(self, path: Path) -> ir.Table:
        """A Parquet file of dense ids that ingest itself has written."""
        return self._view(path.stem + "_ids", self._session.read.parquet(str(path.absolute())))

    def materialize(self, name: str, table: ir.Table, report: ReportShare) -> ir.Table:
        """Compute ``table`` once and keep the result as Parquet files under ``name``; nothing is reported meanwhile."""
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

    def batches(self, table: ir.Table) -> Iterator[pa.RecordBatch]:
        """Compute an expression in the memory of the driver, and take its rows in order."""
        yield from self.fetch(table).to_batches()

    def write_shards(
        self,
        lines: ir.Table,
        order: list[str],
        users: ir.Table | None,
        builder: ShardBuilder,
        report: ReportLines,
    ) -> tuple[list[WrittenShard], Tally]:
        """Sort lines by the columns ``order`` and have the executors write them, each whole shards.

        Returns:
            The files in order of their number, and what became of users, behaviours and impressions.
        """
        assert users is None, "lines have the ids of their users"
        # The builder holds the dictionaries: sent once to each executor, not with every task.
        shared = self._session.sparkContext.broadcast(builder)

        def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            files, tally = shared.value.write(batches)
            yield pa.RecordBatch.from_pydict(
                {"files": [json.dumps([asdict(file) for file in files])], "tally": [json.dumps(tally)]}
            )

        # All lines of a shard come to one task. A task may have several shards, one after the other: user keys sort
        # them.
        frame = self._frame(lines).repartition("shard").sortWithinPartitions(*order)
        parts = self._explained(lambda: frame.mapInArrow(write, "files string, tally string").toArrow()).to_pylist()
        files = [WrittenShard(**file) for part in parts for file in json.loads(part["files"])]
        report(sum(sum(file.behaviors) for file in files))
        return sorted(files, key=lambda file: file.name), _together(parts)

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
            # Files and lines are no matter of Spark's here; what is left is the cluster: memory, disks, executors.
            text = [line.strip() for line in str(error).splitlines() if line.strip()]
            # Behind a trace of a worker stands what has failed there.
            failed = [line for line in text if re.match(r"[\w.]*(Error|Exception): ", line)]
            raise UserError(f"Spark: {(failed or text or [type(error).__name__])[0]}") from None


def _together(parts: list[dict[str, Any]]) -> Tally:
    """The tallies of all tasks, added up."""
    return sum((Counter(json.loads(part["tally"])) for part in parts), Counter[str]())
