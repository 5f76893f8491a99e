"""Runs the cells that are missing, several at a time, each by `dare train` in a process of its own."""

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.experiment.cells import Cell
from pipeline.experiment.child import Child, stop_all
from pipeline.experiment.progress import Progress
from pipeline.experiment.results import add_to_record
from pipeline.files import remove_folder, write_whole
from pipeline.runs.checkpoint import best_checkpoint, checkpoints_in
from pipeline.runs.run_folder import settings_text
from pipeline.train.trainer import StopSignal

POLL_S = 0.2


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
    progress: Progress,
) -> bool:
    """Run the cells that are not finished. A cell that fails leaves its error in its record; the others go on.

    Args:
        cells: in the order in which they are to run; those that are finished are left alone.
        folders: of the data sets, by name.
        dare: the command, such as ``python -m jobs.cli``.
        slots: the environment of each cell that may run at the same time.
        ended: called after each cell, finished or failed, while others run.
        progress: is told of everything.

    Returns:
        Whether all have run; False: SIGTERM or Ctrl-C came first, running cells have saved and stopped.
    """
    for cell in cells:
        if cell.finished:  # The runner may have been killed right after.
            _keep_the_best(cell)
    waiting = deque(cell for cell in cells if not cell.finished)
    free, running = list(range(len(slots)))[::-1], list[Started]()

    def fill() -> None:
        while waiting and free and not stop.received:
            running.append(_start(waiting.popleft(), folders, dare, slots, free.pop()))

    with StopSignal() as stop:
        try:
            fill()
            while running:
                for started in [each for each in running if each.child.poll() is not None]:
                    running.remove(started)
                    free.append(started.slot)
                    _end(started, progress)
                    fill()  # Before what may take a while.
                    ended()
                progress.show([(started.cell, started.child) for started in running])
                if stop.received:
                    break
                time.sleep(POLL_S)
        finally:
            if running:
                print(f"stopping {len(running)} running cells", file=sys.stderr, flush=True)
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
    return Started(cell, Child(command, {"OMP_NUM_THREADS": "1", **slots[slot]}, cell.log), slot)


def _end(started: Started, progress: Progress) -> None:
    cell, child = started.cell, started.child
    error = None
    if child.code:
        error = child.complaint()
    elif not cell.finished:
        error = "it was stopped before its end"
    add_to_record(cell, child.seconds, child.peak_bytes, error)
    if error is None:
        _keep_the_best(cell)
    progress.ended(cell, child.seconds, error)


def _keep_the_best(cell: Cell) -> None:
    """Of a finished cell the other checkpoints are of no use."""
    folder = cell.run.checkpoints
    best = best_checkpoint(folder)
    for checkpoint in checkpoints_in(folder):
        if best is not None and checkpoint.path != best.path:
            remove_folder(checkpoint.path)
