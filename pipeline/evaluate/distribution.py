"""The distribution of scores for TensorBoard, in a size that does not grow with the samples.

C = thresholds of the precision-recall curve, B = buckets of the histogram.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.evaluate.ranks import Ranks
from pipeline.evaluate.samples import EvaluatedSamples

THRESHOLDS = 127
"""0, 1/126, ..., 1; TensorBoard takes no more."""

_LIMIT = torch.arange(-64, 65) / 4
"""Upper limits of the histogram's buckets: logits -16, -15.75, ..., 16; the last bucket has none."""


@dataclass(frozen=True)
class ScoreDistribution:
    """Precision-recall curve and histograms, as keyword arguments for TensorBoard's ``SummaryWriter``."""

    pr_curve: dict[str, NDArray[Any]]
    """Arguments of ``add_pr_curve_raw``, (C,) each, from threshold 0 on.

    A sample is predicted positive if its probability is at least the threshold.
    """
    histograms: dict[str, dict[str, Any]]
    """Arguments of ``add_histogram_raw``: logits of ``positive`` and ``negative`` samples, if there are any."""


def score_distribution(samples: EvaluatedSamples, ranks: Ranks) -> ScoreDistribution:
    """Return the distribution over all ranks, the same on each; every rank must call it."""
    curve = {}
    histograms = {}
    for name, label in (("positive", True), ("negative", False)):
        counts = _Counts()
        for chunk in samples.chunks():
            counts.add(chunk.logit[chunk.label == label])
        counts = counts.over(ranks)
        # At or above a threshold are those that reach it or a higher one: a sum from the end.
        curve[name] = counts.threshold_C.numpy()[::-1].cumsum()[::-1]
        if counts.threshold_C.any():
            histograms[name] = counts.histogram()
    return ScoreDistribution(_pr_curve(curve["positive"], curve["negative"]), histograms)


def _pr_curve(positive_C: NDArray[np.int64], negative_C: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Return the curve from the numbers of samples at or above each threshold."""
    return {
        "true_positive_counts": positive_C,
        "false_positive_counts": negative_C,
        "true_negative_counts": negative_C[0] - negative_C,
        "false_negative_counts": positive_C[0] - positive_C,
        "precision": positive_C / np.maximum(positive_C + negative_C, 1),
        "recall": positive_C / max(positive_C[0], 1),
    }


class _Counts:
    """Counts, sums and extremes of the logits of one label."""

    def __init__(self) -> None:
        self.threshold_C = torch.zeros(THRESHOLDS, dtype=torch.int64)
        """Samples by the highest threshold that their probability reaches."""
        self.bucket_B = torch.zeros(len(_LIMIT) + 1, dtype=torch.int64)
        self.sum = self.sum_squares = 0.0
        self.min, self.max = math.inf, -math.inf

    def add(self, logit: Tensor) -> None:
        """Count logits, float32."""
        if not len(logit):
            return
        # In float64: in float32 the sigmoid of a logit above 17 is 1, and would fall into the last threshold.
        exact = logit.double()
        reached = (exact.sigmoid() * (THRESHOLDS - 1)).long()
        self.threshold_C += reached.bincount(minlength=THRESHOLDS)
        self.bucket_B += torch.bucketize(logit, _LIMIT).bincount(minlength=len(self.bucket_B))
        self.sum += float(exact.sum())
        self.sum_squares += float(exact.square().sum())
        self.min, self.max = min(self.min, float(exact.min())), max(self.max, float(exact.max()))

    def over(self, ranks: Ranks) -> "_Counts":
        """Return the counts over all ranks, the same on each."""
        # Counts travel as integers and sums as floats, in two gathers.
        total = _Counts()
        counts = torch.stack(ranks.gather(torch.cat([self.threshold_C, self.bucket_B]))).sum(0).cpu()
        total.threshold_C, total.bucket_B = counts.split([THRESHOLDS, len(self.bucket_B)])
        sums, sums_squares, minima, maxima = zip(
            *ranks.gather_numbers(self.sum, self.sum_squares, self.min, self.max), strict=True
        )
        total.sum, total.sum_squares = math.fsum(sums), math.fsum(sums_squares)
        total.min, total.max = min(minima), max(maxima)
        return total

    def histogram(self) -> dict[str, Any]:
        """Return the arguments of ``add_histogram_raw``; there must be a sample."""
        # TensorBoard lets the first bucket begin at the minimum and the last end at the maximum: none may be empty.
        used = self.bucket_B.nonzero().flatten().tolist()
        buckets = slice(used[0], used[-1] + 1)
        return {
            "min": self.min,
            "max": self.max,
            "num": int(self.bucket_B.sum()),
            "sum": self.sum,
            "sum_squares": self.sum_squares,
            "bucket_limits": [*_LIMIT.tolist(), np.finfo(np.float64).max][buckets],
            "bucket_counts": self.bucket_B[buckets].tolist(),
        }
