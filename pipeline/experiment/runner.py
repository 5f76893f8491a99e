"""Runs the cells that are missing, several at a time, each by `dare train` in a process of its own."""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Self

from pipeline.experiment.cells import Cell
from pipeline.experiment.child import Child, stop_all
from pipeline.experiment.results import add_to_record, seconds_of
from pipeline.files import write_whole
from pipeline.progress import Progress, duration, time_left
from pipeline.runs.checkpoint import best_of, checkpoints_in, remove_all_but
from pipeline.runs.run_folder import settings_text
from pipeline.train.trainer import StopSignal

_LOGGER = logging.getLogger("dare.experiment")

POLL_S = 0.2
"""Seconds between two looks at the cells that run."""
LINE_EVERY_S = 30.0
"""Seconds between two lines about what runs, where standard error is no terminal."""
_TELLING_SHARE = 0.05
"""A cell of which less is done says nothing about its speed: most of its time went into starting."""


@dataclass(frozen=True)
class Started:
    """A cell that runs."""

    cell: Cell
    child: Child
    slot: int


def run_cells(
    cells: Sequence[Cell],
    folders: Mapping[str, Path],
    dare: Sequence[str],
    slots: Sequence[Mapping[str, str]],
    ended: Callable[[], None],
    progress: "CellProgress",
) -> bool:
    """Run the cells that are not finished. A cell that fails leaves its error in its record; the others go on.

    Args:
        cells: in the order in which they are to run; those that are finished are left alone.
        folders: of the data sets, by name.
        dare: the command, such as ``python -m jobs.cli``.
        slots: the environment of each cell that may run at the same time.
        ended: called after each cell, finished or failed, while others run.
        progress: shows what happens.

    Returns:
        Whether all have run; False: SIGTERM or Ctrl-C came first, running cells have saved and stopped.
    """
    for cell in cells:
        if cell.finished:  # A runner may have been killed between the end of the cell and this.
            _keep_the_best(cell)
    waiting = deque(cell for cell in cells if not cell.finished)
    # Taken from the end, so slot 0 comes first.
    free, running = list(range(len(slots)))[::-1], list[Started]()

    def fill() -> None:
        while waiting and free and not stop.received:
            running.append(_start(waiting.popleft(), folders, dare, slots, free.pop()))

    with StopSignal() as stop:
        try:
            fill()
            while running:
                # A list of its own: the loop changes ``running``.
                for started in [each for each in running if each.child.poll() is not None]:
                    running.remove(started)
                    free.append(started.slot)
                    _end(started, progress)
                    fill()  # Before `ended`, which may take a while.
                    ended()
                progress.show([(started.cell, started.child) for started in running])
                if stop.received:
                    break
                time.sleep(POLL_S)
        finally:
            if running:
                _LOGGER.info("stopping %s running cells", len(running))
            # Whatever ends this block, an error of ours too: no cell outlives its runner, and each may save first.
            stop_all([started.child for started in running])
            for started in running:
                add_to_record(started.cell, started.child.seconds, started.child.peak_bytes, None)
    return not waiting and not running


def _start(
    cell: Cell, folders: Mapping[str, Path], dare: Sequence[str], slots: Sequence[Mapping[str, str]], slot: int
) -> Started:
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    write_whole(cell.settings_file, settings_text(cell.settings))
    command = [
        *(*dare, "train", "--data", str(folders[cell.data]), "--run", str(cell.folder)),
        *("--config", str(cell.settings_file), "--score", str(cell.scores)),
    ]
    # One thread: results do not depend on the machine's cores, and cells side by side do not fight for them.
    return Started(cell, Child(command, {"OMP_NUM_THREADS": "1", **slots[slot]}, cell.log), slot)


def _end(started: Started, progress: "CellProgress") -> None:
    cell, child = started.cell, started.child
    error = None
    if child.code:
        error = child.complaint()
    elif not cell.finished:
        # A stopped run ends with 0 too: it has saved, and the same command goes on.
        error = "it was stopped before its end"
    add_to_record(cell, child.seconds, child.peak_bytes, error)
    if error is None:
        _keep_the_best(cell)
    progress.ended(cell, child.seconds, error)


def _keep_the_best(cell: Cell) -> None:
    """Remove all checkpoints of a finished cell but the best: nothing reads the others any more."""
    checkpoints = checkpoints_in(cell.run.checkpoints)
    best = best_of(checkpoints)
    # One whose record is damaged might be the best.
    if best is None or any(checkpoint.damage is not None for checkpoint in checkpoints):
        return
    remove_all_but(checkpoints, [best])


class Estimate:
    """When an experiment will be done, by how long cells like those that are left have taken.

    Args:
        parallel: how many run at the same time.
    """

    def __init__(self, parallel: int) -> None:
        self._parallel = parallel
        self._seconds: dict[tuple[str, ...], list[float]] = {}

    def learn(self, cell: Cell, seconds: float) -> None:
        """Take note that a cell took so many seconds."""
        for key in _kinds(cell):
            self._seconds.setdefault(key, []).append(seconds)

    def seconds_left(self, cells: Sequence[Cell], elapsed: Mapping[Path, tuple[float, float]]) -> float | None:
        """Seconds until the last of ``cells`` ends; None: nothing is known yet.

        Args:
            cells: those that are left.
            elapsed: by folder of each cell that runs: its seconds so far, and the share of its steps that is done.
        """
        # Before any cell like it has ended, a cell that runs tells by its own speed.
        guesses = [seconds / share for seconds, share in elapsed.values() if share > _TELLING_SHARE]
        total = 0.0
        for cell in cells:
            like = next((self._seconds[key] for key in _kinds(cell) if key in self._seconds), guesses)
            if not like:
                return None
            total += max(0.0, fmean(like) - elapsed.get(cell.folder, (0.0, 0.0))[0])
        return total / min(self._parallel, max(1, len(cells)))


def _kinds(cell: Cell) -> list[tuple[str, ...]]:
    """Keys of cells that take about as long, the most alike first."""
    data, dim = f"data {cell.data}", f"dim {cell.dim}"
    return [(data, dim, cell.label), (data, cell.label), (data, dim), (data,), ()]


class CellProgress:
    """How far an experiment is, on standard error: a line for each cell that has ended, and what runs now.

    Args:
        cells: all of the experiment.
        parallel: how many run at the same time.
    """

    def __init__(self, cells: Sequence[Cell], parallel: int) -> None:
        self._left = {cell.folder: cell for cell in cells if not cell.finished}
        self._all, self._failed = len(cells), 0
        self._estimate = Estimate(parallel)
        for cell in cells:
            if cell.finished and (seconds := seconds_of(cell)) is not None:
                self._estimate.learn(cell, seconds)
        self._running: Sequence[tuple[Cell, Child]] = ()
        self._progress = Progress(self._all, lambda _: self._text(), done=self._ended, every_s=LINE_EVERY_S)

    def ended(self, cell: Cell, seconds: float, error: str | None) -> None:
        """A cell is finished, or has failed."""
        del self._left[cell.folder]
        if error is None:
            self._estimate.learn(cell, seconds)
        self._failed += error is not None
        outcome = f"failed after {duration(seconds)}: {error}" if error else f"done in {duration(seconds)}"
        _LOGGER.info("%s/%s %s: %s", self._ended, self._all, cell, outcome)

    def show(self, running: Sequence[tuple[Cell, Child]]) -> None:
        """Show these cells as running; to be called often."""
        self._running = running
        if running:
            self._progress.reach(self._ended)

    def __enter__(self) -> Self:
        self._progress.__enter__()
        if self._ended:
            _LOGGER.info("%s/%s cells are finished already", self._ended, self._all)
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.__exit__(*error)

    def _text(self) -> str:
        lines, elapsed = [], {}
        for cell, child in self._running:
            share, line = _step(cell, child)
            elapsed[cell.folder] = (seconds_of(cell) or 0.0) + child.seconds, share
            lines.append(f"{cell}: {line}")
        seconds = self._estimate.seconds_left(list(self._left.values()), elapsed)
        failed = f", {self._failed} failed" if self._failed else ""
        return "\n".join([f"{self._ended}/{self._all} cells{failed}{time_left(seconds)}", *lines])

    @property
    def _ended(self) -> int:
        return self._all - len(self._left)


def _step(cell: Cell, child: Child) -> tuple[float, str]:
    """Share of the steps that is done, and a line about it."""
    file = cell.run.progress_file
    # An older file is of an earlier start of the cell.
    if not file.is_file() or file.stat().st_mtime < child.began:
        return 0.0, "begins"
    at = cell.run.progress()
    if at is None:
        return 0.0, "begins"
    rate = f", {at['samples_per_s']:,.0f} samples/s" if at["samples_per_s"] else ""
    return at["step"] / at["steps"], f"step {at['step']}/{at['steps']}{rate}"
