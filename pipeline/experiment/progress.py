"""When an experiment will be done, by how long cells like those that are left have taken.

How far an experiment is: lines that stay for what has ended, and one, renewed now and then, for what runs.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pipeline.experiment.cells import Cell
from pipeline.experiment.child import Child
from pipeline.experiment.results import seconds_of
from pipeline.files import read_json
from pipeline.progress import duration

_TELLING = 0.05
"""A cell of which less is done says nothing yet: it has mostly started."""


class Estimate:
    """Learns from cells as they end.

    Args:
        parallel: how many run at the same time.
    """

    def __init__(self, parallel: int) -> None:
        self._parallel = parallel
        self._seconds: dict[tuple[str, ...], list[float]] = {}

    def learn(self, cell: Cell, seconds: float) -> None:
        """A cell took so long."""
        for key in _kinds(cell):
            self._seconds.setdefault(key, []).append(seconds)

    def seconds_left(self, cells: Sequence[Cell], elapsed: Mapping[Path, tuple[float, float]]) -> float | None:
        """Until the last of ``cells`` ends; None: nothing is known yet.

        Args:
            cells: those that are left.
            elapsed: seconds, and the share of the steps that is done, of those that run, by folder.
        """
        guesses = [seconds / share for seconds, share in elapsed.values() if share > _TELLING]
        total = 0.0
        for cell in cells:
            like = next((self._seconds[key] for key in _kinds(cell) if key in self._seconds), guesses)
            if not like:
                return None
            total += max(0.0, fmean(like) - elapsed.get(cell.folder, (0.0, 0.0))[0])
        return total / min(self._parallel, max(1, len(cells)))


def _kinds(cell: Cell) -> list[tuple[str, ...]]:
    """What a cell is like, the closest likeness first."""
    data, dim = f"data {cell.data}", f"dim {cell.dim}"
    return [(data, dim, cell.label), (data, cell.label), (data, dim), (data,), ()]


LINE_EVERY_S = 30.0
"""Where nobody watches: seconds between two lines."""
RENEWED_EVERY_S = 2.0
"""On a terminal."""


class Progress:
    """Shown on standard error.

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
        self._told = time.monotonic()
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=True) if sys.stderr.isatty() else None

    def ended(self, cell: Cell, seconds: float, error: str | None) -> None:
        """A cell is finished, or has failed."""
        del self._left[cell.folder]
        if error is None:
            self._estimate.learn(cell, seconds)
        self._failed += error is not None
        outcome = f"failed after {duration(seconds)}: {error}" if error else f"done in {duration(seconds)}"
        self._say(f"{self._ended}/{self._all} {cell}: {outcome}")

    def show(self, running: Sequence[tuple[Cell, Child]]) -> None:
        """What runs; to be called often."""
        now = time.monotonic()
        if not running or now - self._told < (RENEWED_EVERY_S if self._live else LINE_EVERY_S):
            return
        self._told = now
        lines, elapsed = [], {}
        for cell, child in running:
            share, line = _step(cell, child)
            elapsed[cell.folder] = (seconds_of(cell) or 0.0) + child.seconds, share
            lines.append(f"{cell}: {line}")
        seconds = self._estimate.seconds_left(list(self._left.values()), elapsed)
        failed = f", {self._failed} failed" if self._failed else ""
        left = "" if seconds is None else f", {duration(seconds)} left"
        head = f"{self._ended}/{self._all} cells{failed}{left}"
        if self._live:
            self._live.update(Text("\n  ".join([head, *lines])), refresh=True)
        else:
            self._say(f"{head}; {'; '.join(lines)}")

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        if self._ended:
            self._say(f"{self._ended}/{self._all} cells are finished already")
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    @property
    def _ended(self) -> int:
        return self._all - len(self._left)

    def _say(self, line: str) -> None:
        self._console.print(Text(line))


def _step(cell: Cell, child: Child) -> tuple[float, str]:
    """Share of the steps that is done, and a line about it."""
    file = cell.run.progress_file
    if not file.is_file() or file.stat().st_mtime < child.began:
        return 0.0, "begins"
    at = read_json(cell.run.progress_file)
    rate = f", {at['samples_per_s']:,.0f} samples/s" if at["samples_per_s"] else ""
    return at["step"] / at["steps"], f"step {at['step']}/{at['steps']}{rate}"
