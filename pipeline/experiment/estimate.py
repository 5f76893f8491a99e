"""When an experiment will be done, by how long cells like those that are left have taken."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from pipeline.experiment.cells import Cell

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
