"""Finished cells by model, and each pair of models of a data set and dim compared by the paired bootstrap."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from pipeline.experiment.bootstrap import (
    F64,
    REPLICATES,
    SEED,
    Difference,
    Predictions,
    paired_difference,
    replicated_auc,
)
from pipeline.experiment.results import Result
from pipeline.files import whole_file
from schemas.errors import UserError

Column = tuple[str, int]
"""Data set and dim."""


@dataclass(frozen=True)
class Pair:
    """``first`` less ``second``."""

    data: str
    dim: int
    first: str
    second: str
    seeds: int
    """Those that both have finished."""
    of: Difference


@dataclass(frozen=True)
class _Replicates:
    auc_R: F64
    users: str
    """Tells one set of users from another."""


FILE = "bootstrap.npz"
"""In the folder of a run: its replicates."""


class Comparison:
    """Keeps the replicates of each cell, here and in the folder of its run, so that they are computed once.

    Args:
        out: folder of the experiment.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._replicates: dict[str, _Replicates] = {}

    def pairs(self, results: Sequence[Result]) -> list[Pair]:
        """All pairs that have a seed in common, the model of the higher mean AUC first.

        Raises:
            UserError: predictions of one data set that are not of the same users.
        """
        found = []
        for data, dim in dict.fromkeys((result.data, result.dim) for result in results):
            cells = grouped([result for result in results if (result.data, result.dim) == (data, dim)])
            by_label = {label: {cell.seed: cell for cell in group} for (label, _), group in cells.items()}
            labels = sorted(by_label, key=lambda label: -_mean(by_label[label].values()))
            for place, first in enumerate(labels):
                for second in labels[place + 1 :]:
                    seeds = sorted(by_label[first].keys() & by_label[second].keys())
                    if seeds:
                        one, other = ([by_label[label][seed] for seed in seeds] for label in (first, second))
                        found.append(Pair(data, dim, first, second, len(seeds), self._difference(one, other)))
        return found

    def _difference(self, one: Sequence[Result], other: Sequence[Result]) -> Difference:
        ours, theirs = ([self._of(cell) for cell in cells] for cells in (one, other))
        for each in (*ours, *theirs):
            if each.users != ours[0].users:
                raise UserError(
                    f"{one[0].run} and {other[0].run}: their test predictions are not of the same users; "
                    "the data set has changed in between: remove what was run before"
                )
        return paired_difference(
            [each.auc_R for each in ours], [each.auc_R for each in theirs], _mean(one) - _mean(other)
        )

    def _of(self, cell: Result) -> _Replicates:
        if cell.run not in self._replicates:
            self._replicates[cell.run] = _replicates(self._out / cell.run)
        return self._replicates[cell.run]


def _replicates(run: Path) -> _Replicates:
    """As they stand in a run's folder; computed from its predictions, and written there, if they do not."""
    file, draws = run / FILE, [REPLICATES, SEED]
    if file.is_file():
        with np.load(file) as known:
            if known["draws"].tolist() == draws:
                return _Replicates(known["auc_R"], str(known["users"]))
    predictions = Predictions.read(run / "scores")
    users = hashlib.blake2b(predictions.user_id_U.tobytes(), digest_size=16).hexdigest()
    found = _Replicates(replicated_auc(predictions), users)
    # A stream, because numpy adds an ending of its own to a name.
    with whole_file(file) as unfinished, unfinished.open("wb") as stream:
        np.savez(stream, auc_R=found.auc_R, users=users, draws=draws)
    return found


def grouped(results: Sequence[Result]) -> dict[tuple[str, Column], list[Result]]:
    """Finished cells by label and column, all seeds together; those whose AUC is not defined are left out."""
    found: dict[tuple[str, Column], list[Result]] = {}
    for result in results:
        if result.auc is not None:
            found.setdefault((result.label, (result.data, result.dim)), []).append(result)
    return found


def _mean(cells: Iterable[Result]) -> float:
    return fmean(cell.auc for cell in cells if cell.auc is not None)
