"""What ingest asks of the program that runs its definition."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import ibis.expr.types as ir
import pyarrow as pa

from pipeline.ingest.shards import ShardBuilder, Written
from pipeline.ingest.sources import Files

Progress = Callable[[float], object]
"""Called with the share that is done, 0 .. 1."""


class Engine(Protocol):
    """Runs Ibis expressions over logs that may be larger than memory."""

    def read(self, files: Files) -> ir.Table:
        """The log in ``files``, each needed column in its type.

        Raises:
            ValueError: when it runs, for a line or file that cannot be read.
        """
        ...

    def open(self, path: Path) -> ir.Table:
        """A Parquet file of ours."""
        ...

    def keep(self, name: str, table: ir.Table, progress: Progress) -> ir.Table:
        """Compute ``table`` once, on disk.

        Raises:
            ValueError: a line or file of the input cannot be read.
        """
        ...

    def leave(self, memory: int) -> None:
        """From now on leave so many bytes of the memory limit to the caller.

        Raises:
            ValueError: the limit is too small for that.
        """
        ...

    def fetch(self, table: ir.Table) -> pa.Table:
        """The result of an expression, in memory."""
        ...

    def write_shards(
        self, lines: ir.Table, order: list[str], builder: ShardBuilder, progress: Callable[[int], object]
    ) -> tuple[list[Written], int]:
        """Sort lines and have ``builder`` write them; ``progress`` is called with numbers of lines.

        Returns:
            The files in order of their number, and how many users were seen.
        """
        ...

    def close(self) -> None:
        """Let go of what the engine holds."""
        ...
