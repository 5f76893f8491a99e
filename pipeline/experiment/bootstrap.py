"""Pairs of models compared by the paired bootstrap over users: how sure is it that the AUC of one is above the other's.

A replicate draws as many users as there are, with replacement. All models see the same draws, so the difference of two
is known better than either (Efron and Tibshirani, An Introduction to the Bootstrap, chapters 8 and 16).

N = samples, U = users, R = replicates, S = seeds.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import ArrowException

from pipeline.experiment.results import Result, grouped
from pipeline.files import whole_file
from schemas.errors import UserError

REPLICATES = 2000
SEED = 20
"""Seed of the draws: equal numbers of users give equal draws."""
REPLICATES_FILE = "bootstrap.npz"
"""In the folder of a run: its AUC in each replicate."""
_REPLICATES_A_PASS = 128
"""Replicates that are computed in one pass over the samples."""

F64 = NDArray[np.float64]
U16 = NDArray[np.uint16]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Predictions:
    """The samples of a split with their scores, as `dare score` wrote them."""

    user_id_U: NDArray[np.int64] | NDArray[np.str_]
    """Raw ids, ascending."""
    user_N: NDArray[np.int64]
    """Index of the sample's user in ``user_id_U``."""
    label_N: NDArray[np.bool_]
    score_N: NDArray[np.float32]

    @property
    def users(self) -> int:
        """U."""
        return len(self.user_id_U)

    @classmethod
    def read(cls, folder: Path) -> "Predictions":
        """Read what `pipeline.evaluate.score.score_run` wrote into ``folder``.

        Raises:
            UserError: the folder is not there or holds something else.
        """
        try:
            table = pq.read_table(folder, columns=["user_id", "label", "score"], page_checksum_verification=True)
        except (OSError, ArrowException) as error:
            raise UserError(f"{folder}: no predictions that can be read ({' '.join(str(error).split())})") from None
        user_id_N = table["user_id"].combine_chunks()
        if pa.types.is_string(user_id_N.type):
            # Of each user once: numpy has texts in a width that all of them fit into.
            user_id_U = np.sort(user_id_N.unique().to_numpy(zero_copy_only=False).astype(str))
            user_N = pc.index_in(user_id_N, pa.array(user_id_U)).to_numpy().astype(np.int64)
        else:
            user_id_U, user_N = np.unique(user_id_N.to_numpy(), return_inverse=True)
        return cls(user_id_U, user_N, table["label"].to_numpy().astype(bool), table["score"].to_numpy())


@dataclass(frozen=True)
class Difference:
    """The mean AUC over seeds of one model less that of another one, and how sure it is."""

    difference: float
    low: float
    """2.5 % of the replicates are below."""
    high: float
    """2.5 % of the replicates are above."""
    p: float
    """Two-sided p value: twice the share of replicates on the rarer side of 0, (count + 1) / (R + 1), at most 1."""


def replicated_auc(predictions: Predictions, replicates: int = REPLICATES) -> F64:
    """AUC of a run in each replicate; pairs of equal scores count half.

    Args:
        predictions: of the run. The draws depend on the number of its users alone.
        replicates: R.

    Returns:
        float64 (R,); nan where a draw has no positives or no negatives.
    """
    # Of equal scores the negatives come last in one order and first in the other: half the sum counts a tie as half.
    positive_N = predictions.label_N
    before = np.lexsort((~positive_N, predictions.score_N))
    behind = np.lexsort((positive_N, predictions.score_N))
    # One generator for all passes, which draws replicate after replicate: how many are made in a pass changes no draw.
    rng = np.random.default_rng(SEED)
    parts = []
    for first in range(0, replicates, _REPLICATES_A_PASS):
        weight_UR = _draws(rng, predictions.users, min(_REPLICATES_A_PASS, replicates - first))
        twice_R, pairs_R = np.zeros((2, weight_UR.shape[1]))
        for order_N in (before, behind):
            twice_R += _ordered_pairs(predictions.user_N[order_N], positive_N[order_N], weight_UR, pairs_R)
        with np.errstate(invalid="ignore"):
            parts.append(twice_R / (2 * pairs_R))
    return np.concatenate(parts)


def paired_difference(first_SR: Sequence[F64], second_SR: Sequence[F64], difference: float) -> Difference:
    """Compare two models that were run with the same seeds.

    Args:
        first_SR: for each seed, what `replicated_auc` returned for the first model.
        second_SR: the same of the second model, for the same seeds and users.
        difference: the first model's mean AUC over the seeds, on all users, less the second's.

    Returns:
        The difference with its interval and p value; these are nan where no replicate has both labels.
    """
    assert len(first_SR) == len(second_SR) > 0
    # Paired: both models have seen the same draw of users in each replicate.
    difference_R = np.mean(first_SR, axis=0) - np.mean(second_SR, axis=0)
    difference_R = difference_R[~np.isnan(difference_R)]
    if not len(difference_R):
        return Difference(difference, np.nan, np.nan, np.nan)
    low, high = np.quantile(difference_R, [0.025, 0.975])
    rarer = min((difference_R <= 0).sum(), (difference_R >= 0).sum())
    return Difference(difference, float(low), float(high), min(1.0, 2 * (int(rarer) + 1) / (len(difference_R) + 1)))


def _draws(rng: np.random.Generator, users: int, replicates: int) -> U16:
    """How often each user is drawn, (U, R); a replicate's draw does not depend on how many are made together."""
    assert users > 0
    # 16 bits: a user is drawn about once. Turned around at the end, so that all replicates of a sample's user lie side
    # by side.
    weight_RU = np.empty((replicates, users), np.uint16)
    for weight_U in weight_RU:
        np.copyto(weight_U, np.bincount(rng.integers(0, users, users), minlength=users), casting="unsafe")
    return np.ascontiguousarray(weight_RU.T)


@numba.njit(cache=True, nogil=True)
def _ordered_pairs(user_N: I64, positive_N: NDArray[np.bool_], weight_UR: U16, pairs_R: F64) -> F64:
    """Number of pairs of a positive and a negative before it, each as often as its two users are drawn.

    Args:
        user_N: index of each sample's user, in the order to be judged.
        positive_N: labels in the same order.
        weight_UR: how often each user is drawn.
        pairs_R: is overwritten with the number of all pairs of a positive and a negative.

    Returns:
        (R,), whole numbers: exact in float64 up to 2^53.
    """
    replicates = weight_UR.shape[1]
    positives_R, negatives_R = np.zeros(replicates), np.zeros(replicates)
    ordered_R = np.zeros(replicates)
    # In this order, the negatives that are counted so far are those before the sample, in each replicate.
    for sample in range(len(user_N)):
        weight_R = weight_UR[user_N[sample]]
        if positive_N[sample]:
            for r in range(replicates):
                ordered_R[r] += weight_R[r] * negatives_R[r]
                positives_R[r] += weight_R[r]
        else:
            for r in range(replicates):
                negatives_R[r] += weight_R[r]
    for r in range(replicates):
        pairs_R[r] = positives_R[r] * negatives_R[r]
    return ordered_R


@dataclass(frozen=True)
class Pair:
    """Two models of a data set and dim; the one of the higher mean AUC is the first."""

    data: str
    dim: int
    first: str
    second: str
    seeds: int
    """Number of seeds that both have finished."""
    of: Difference
    """``first`` less ``second``."""


@dataclass(frozen=True)
class _Replicates:
    auc_R: F64
    users: str
    """Digest of the users' ids: tells one set of users from another."""


class Comparison:
    """Keeps the replicates of each cell, here and in the folder of its run, so that they are computed once.

    Args:
        out: folder of the experiment.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._replicates: dict[str, _Replicates] = {}

    def pairs(self, results: Sequence[Result]) -> list[Pair]:
        """All pairs of models that have a seed in common.

        Args:
            results: of the cells; those without a test AUC are left out.

        Raises:
            UserError: predictions of one data set that are not of the same users.
        """
        pairs = []
        for data, dim in dict.fromkeys((result.data, result.dim) for result in results):
            cells = grouped([result for result in results if (result.data, result.dim) == (data, dim)])
            by_label = {label: {cell.seed: cell for cell in group} for (label, _), group in cells.items()}
            # By mean AUC, so that a pair's first is the better one.
            labels = sorted(by_label, key=lambda label: -_mean(by_label[label].values()))
            for index, first in enumerate(labels):
                for second in labels[index + 1 :]:
                    seeds = sorted(by_label[first].keys() & by_label[second].keys())
                    if seeds:
                        one, other = ([by_label[label][seed] for seed in seeds] for label in (first, second))
                        pairs.append(Pair(data, dim, first, second, len(seeds), self._difference(one, other)))
        return pairs

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
    """The replicates in the folder of a run; computed from its predictions and written there if they are not yet."""
    file, draws = run / REPLICATES_FILE, [REPLICATES, SEED]
    if file.is_file():
        # A file of another number of replicates or of other draws cannot be paired with what is computed today.
        with np.load(file) as known:
            if known["draws"].tolist() == draws:
                return _Replicates(known["auc_R"], str(known["users"]))
    predictions = Predictions.read(run / "scores")
    # Equal numbers of users give equal draws, also if they are others: the digest tells them apart.
    users = hashlib.blake2b(predictions.user_id_U.tobytes(), digest_size=16).hexdigest()
    replicates = _Replicates(replicated_auc(predictions), users)
    # A stream, because numpy adds an ending of its own to a name.
    with whole_file(file) as unfinished, unfinished.open("wb") as stream:
        np.savez(stream, auc_R=replicates.auc_R, users=users, draws=draws)
    return replicates


def _mean(cells: Iterable[Result]) -> float:
    return fmean(cell.auc for cell in cells if cell.auc is not None)
