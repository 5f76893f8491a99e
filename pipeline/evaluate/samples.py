"""The samples that a rank has evaluated, 13 bytes each, and the distribution of their scores for TensorBoard.

N = samples of a batch, C = thresholds of the precision-recall curve, B = buckets of the histogram.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.evaluate.auc import Ranks

CHUNK = 1 << 20
"""Samples of a chunk."""

THRESHOLDS = 127
"""0, 1/126, ..., 1; TensorBoard takes no more."""

_LIMIT = torch.arange(-64, 65) / 4
"""Upper limits of the histogram's buckets: logits -16, -15.75, ..., 16; the last bucket has none."""


@dataclass(frozen=True)
class Chunk:
    """Columns of some samples, on the CPU."""

    user_id: Tensor
    """int64."""
    label: Tensor
    """bool."""
    logit: Tensor
    """float32."""

    def __len__(self) -> int:
        return len(self.label)

    def part(self, start: int, end: int) -> "Chunk":
        """Return the samples start .. end, sharing memory with these."""
        return Chunk(self.user_id[start:end], self.label[start:end], self.logit[start:end])


class EvaluatedSamples:
    """User, label and logit of the samples that a rank has evaluated. Grows by batches, which it copies to the CPU."""

    def __init__(self) -> None:
        self._chunks: list[Chunk] = []
        self._size = 0
        self.wrong_logits = 0
        """How many logits were not finite."""
        self.wrong_labels = 0
        """How many labels were neither 0 nor 1."""

    def __len__(self) -> int:
        return self._size

    def add(self, user_id_N: Tensor, label_N: Tensor, logit_N: Tensor) -> None:
        """Append a batch, on any device. Wrong values are counted, not refused, so that no rank fails alone.

        Args:
            user_id_N: (N,) int64.
            label_N: (N,) float32, 0 or 1.
            logit_N: (N,) float32.
        """
        assert user_id_N.shape == label_N.shape == logit_N.shape == (len(label_N),)
        # On the CPU, where an epoch's samples fit; a GPU's memory is for the tables.
        assert (user_id_N.dtype, logit_N.dtype) == (torch.int64, torch.float32)
        user_id_N, label_N, logit_N = user_id_N.detach().cpu(), label_N.detach().cpu(), logit_N.detach().cpu()
        self.wrong_logits += int((~logit_N.isfinite()).sum())
        self.wrong_labels += int(((label_N != 0) & (label_N != 1)).sum())
        batch = Chunk(user_id_N, label_N > 0, logit_N)
        # Copied into large chunks: as many small tensors as there were batches would cost more than the samples in
        # them.
        done = 0
        while done < len(batch):
            filled = self._size % CHUNK
            if not filled:
                self._chunks.append(Chunk(user_id_N.new_empty(CHUNK), batch.label.new_empty(CHUNK), torch.empty(CHUNK)))
            count = min(CHUNK - filled, len(batch) - done)
            free, source = self._chunks[-1].part(filled, filled + count), batch.part(done, done + count)
            free.user_id.copy_(source.user_id)
            free.label.copy_(source.label)
            free.logit.copy_(source.logit)
            self._size += count
            done += count

    def chunks(self) -> Iterator[Chunk]:
        """Yield the samples in the order in which they were added; no chunk is empty."""
        for index, chunk in enumerate(self._chunks):
            yield chunk.part(0, min(CHUNK, self._size - index * CHUNK))


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
