"""The predictions of a run, as `dare score` wrote them.

N = samples, U = users.

Paired bootstrap over users: how sure is it that one model's AUC is above another's.

A replicate draws as many users as there are, with replacement. All models see the same draws, so the difference of two
is known better than either (Efron and Tibshirani, An Introduction to the Bootstrap, chapters 8 and 16).

N = samples, U = users, R = replicates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray


@dataclass(frozen=True)
class Predictions:
    """Samples of a split."""

    user_id_U: NDArray[np.int64]
    """Ascending."""
    user_N: NDArray[np.int64]
    """Place in ``user_id_U``."""
    label_N: NDArray[np.bool_]
    score_N: NDArray[np.float32]

    @property
    def users(self) -> int:
        """U."""
        return len(self.user_id_U)

    @classmethod
    def read(cls, folder: Path) -> "Predictions":
        """Read what `pipeline.evaluate.score.score_run` wrote into ``folder``."""
        table = pq.read_table(folder, columns=["user_id", "label", "score"])
        user_id_U, user_N = np.unique(table["user_id"].to_numpy(), return_inverse=True)
        return cls(user_id_U, user_N, table["label"].to_numpy().astype(bool), table["score"].to_numpy())


REPLICATES = 2000
SEED = 20
"""Of the draws: the same users give the same draws."""
_TOGETHER = 128
"""Replicates of a pass over the samples."""

F64 = NDArray[np.float64]
U16 = NDArray[np.uint16]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Difference:
    """Of the mean AUC of two models over seeds: the first less the second."""

    difference: float
    low: float
    """2.5 % of the replicates are below."""
    high: float
    """2.5 % of the replicates are above."""
    p: float
    """Two-sided: twice the share of replicates on the rarer side of 0, (count + 1) / (R + 1), at most 1."""


def replicated_auc(predictions: Predictions, replicates: int = REPLICATES) -> F64:
    """AUC in each replicate; equal scores count half.

    Args:
        predictions: of one run. The draws depend on the number of its users alone.
        replicates: R.

    Returns:
        (R,); nan where a draw has no positives or no negatives.
    """
    # Of equal scores the negatives come last in one order and first in the other: half the sum counts a tie as half.
    positive_N = predictions.label_N
    before = np.lexsort((~positive_N, predictions.score_N))
    behind = np.lexsort((positive_N, predictions.score_N))
    rng = np.random.default_rng(SEED)
    found = []
    for first in range(0, replicates, _TOGETHER):
        weight_UR = _draws(rng, predictions.users, min(_TOGETHER, replicates - first))
        twice_R, pairs_R = np.zeros((2, weight_UR.shape[1]))
        for order_N in (before, behind):
            twice_R += _ordered_pairs(predictions.user_N[order_N], positive_N[order_N], weight_UR, pairs_R)
        with np.errstate(invalid="ignore"):
            found.append(twice_R / (2 * pairs_R))
    return np.concatenate(found)


def paired_difference(first_SR: Sequence[F64], second_SR: Sequence[F64], difference: float) -> Difference:
    """Compare two models that were run with the same seeds.

    Args:
        first_SR: for each seed, what `replicated_auc` returned for the one model.
        second_SR: for the other; the same seeds, the same users.
        difference: of their mean AUCs over the seeds, on all users.
    """
    assert len(first_SR) == len(second_SR) > 0
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
    weight_RU = np.empty((replicates, users), np.uint16)
    for weight_U in weight_RU:
        np.copyto(weight_U, np.bincount(rng.integers(0, users, users), minlength=users), casting="unsafe")
    return np.ascontiguousarray(weight_RU.T)


@numba.njit(cache=True, nogil=True)
def _ordered_pairs(user_N: I64, positive_N: NDArray[np.bool_], weight_UR: U16, pairs_R: F64) -> F64:
    """Weighted pairs of a positive and a negative before it, (R,); ``pairs_R`` becomes all pairs.

    All are whole numbers, exact in float64 up to 2^53.
    """
    replicates = weight_UR.shape[1]
    positives_R, negatives_R = np.zeros(replicates), np.zeros(replicates)
    ordered_R = np.zeros(replicates)
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
