"""The folder of an experiment: whose it is, that one runner at a time works in it, and its results and report."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from omegaconf import OmegaConf

from pipeline.errors import description
from pipeline.experiment.bootstrap import Comparison, Pair
from pipeline.experiment.cells import Cell, Parameters
from pipeline.experiment.report import write_report
from pipeline.experiment.results import Result, result_of, write_results
from pipeline.files import locked, write_whole
from schemas.documents import notice_unverified, read_bytes, verify_yaml, yaml_document
from schemas.errors import UserError
from schemas.experiment import ExperimentSettings
from schemas.settings import load_settings

SETTINGS = "experiment.yaml"
"""File of an experiment's folder: its settings."""
LOCK = ".experiment.lock"
"""File that the process holds which runs the experiment; `.lock` would make the folder that of a run."""
REPORT_EVERY_S = 60.0
"""While cells run, the report is written at most so often."""


@contextmanager
def held(out: Path, experiment: ExperimentSettings) -> Iterator[None]:
    """Hold the folder until the block or the process ends, so that no other runner works in it.

    Args:
        out: folder of the experiment; a new one is made, with the experiment's settings in it.
        experiment: its settings.

    Raises:
        UserError: another runner holds the folder, or it is that of something else or of another experiment.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out names a folder")
    file = out / SETTINGS
    if out.is_dir() and any(entry.name != LOCK for entry in out.iterdir()) and not file.is_file():
        raise UserError(f"{out} is not empty and not the folder of an experiment; choose another one")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / LOCK, f"another process is running the experiment in {out}; wait for it or stop it"):
        # A folder without runs may hold the settings of an experiment that was refused before anything ran: no reason
        # to refuse the one that mends it.
        begun = file.is_file() and (out / "runs").is_dir()
        if begun and not verify_yaml(file, read_bytes(file)):
            notice_unverified(out)
        former = load_settings(ExperimentSettings, [file]).name if begun else experiment.name
        if former != experiment.name:
            raise UserError(f"{out} holds the experiment {former}, not {experiment.name}; choose another folder")
        if not file.is_file():
            write_settings(out, experiment)
        yield


def write_settings(out: Path, experiment: ExperimentSettings) -> None:
    """Write the experiment's settings into its folder."""
    content = OmegaConf.create(experiment.model_dump(mode="json", exclude_none=True))
    write_whole(out / SETTINGS, yaml_document(OmegaConf.to_yaml(content)))


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

        It is a thread because the comparison of many users takes a while. A file that cannot be written is no reason to
        stop, for other cells run: standard error says so, and the next time may go better.
        """
        with _failure_is_told():
            results = self._results()
            # At most one report at a time: the next cell brings a newer one anyway.
            busy = self._writing is not None and not self._writing.done()
            if not busy and time.monotonic() - self._reported > REPORT_EVERY_S:
                self._reported = time.monotonic()
                self._writing = self._thread.submit(self._try_to_report, results)

    def write(self) -> tuple[list[Result], list[Pair]]:
        """Write everything.

        Returns:
            The results of all cells, and the pairs of models that can be compared.

        Raises:
            OSError: a file cannot be written.
            UserError: predictions of one data set are not of the same users.
        """
        # Waits: an older report must not be written over this one.
        self._thread.shutdown()
        results = self._results()
        return results, self._report(results)

    def _try_to_report(self, results: Sequence[Result]) -> None:
        with _failure_is_told():
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
def _failure_is_told() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        logging.getLogger("dare.experiment").error("results or report cannot be written now: %s", description(error))
