"""What the folder of an experiment says of its cells: results and report, written anew as cells end."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from pipeline.error_line import error_line
from pipeline.experiment.cells import Cell
from pipeline.experiment.comparison import Comparison, Pair
from pipeline.experiment.report import write_report
from pipeline.experiment.results import Result, result_of, write_results
from pipeline.experiment.sizes import Parameters
from schemas.experiment import ExperimentSettings

REPORT_EVERY_S = 60.0
"""While cells run, the report is written at most so often."""


class Documents:
    """Writes `results.parquet`, `report.md` and `report.html`.

    Args:
        out: folder of the experiment.
        experiment: its settings.
        cells: all of them.
        parameters: as `parameters_of` returns them.
        command: that was given, for the report.
    """

    def __init__(
        self,
        out: Path,
        experiment: ExperimentSettings,
        cells: Sequence[Cell],
        parameters: Mapping[tuple[str, str, int], Parameters],
        command: str,
    ) -> None:
        self._out, self._experiment, self._cells = out, experiment, cells
        self._parameters, self._command = parameters, command
        self._comparison = Comparison(out)
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._reported = -REPORT_EVERY_S

    def cell_ended(self) -> None:
        """Write the results, and have a thread write the report if the last one is not new.

        A thread, for the comparison of many users takes a while; and what cannot be written now is told and no more,
        for other cells run.
        """
        with _told():
            results = self._results()
            busy = self._writing is not None and not self._writing.done()
            if not busy and time.monotonic() - self._reported > REPORT_EVERY_S:
                self._reported = time.monotonic()
                self._writing = self._thread.submit(self._try_to_report, results)

    def write(self) -> tuple[list[Result], list[Pair]]:
        """Write everything, and return what it says.

        Raises:
            OSError: a file that cannot be written.
            ValueError: predictions of one data set that are not of the same users.
        """
        self._thread.shutdown()
        results = self._results()
        return results, self._report(results)

    def _try_to_report(self, results: Sequence[Result]) -> None:
        with _told():
            self._report(results)

    def _results(self) -> list[Result]:
        results = [
            result_of(cell, self._parameters[cell.data, cell.label, cell.dim], self._out) for cell in self._cells
        ]
        write_results(results, self._out / "results.parquet")
        return results

    def _report(self, results: Sequence[Result]) -> list[Pair]:
        pairs = self._comparison.pairs(results)
        write_report(self._out, self._experiment, results, pairs, self._command)
        return pairs


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        print(f"results or report cannot be written now: {error_line(error)}", file=sys.stderr, flush=True)
