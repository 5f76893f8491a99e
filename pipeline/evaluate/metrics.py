"""The metrics of an evaluation: each rank collects its samples, all of them compute the metrics together.

N = samples of a batch.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from pipeline.evaluate.auc import Ranks, auc, grouped_auc
from pipeline.evaluate.samples import EvaluatedSamples, ScoreDistribution, score_distribution
from schemas.errors import UserError


class Likelihood(NamedTuple):
    """Sums over all samples of all ranks, in float64."""

    log_loss: float
    """Sum of -log of the probability that the prediction gave to the label, natural logarithm."""
    prediction: float
    """Sum of the predicted probabilities."""


def likelihood(samples: EvaluatedSamples, ranks: Ranks) -> Likelihood:
    """Return the sums, the same on each rank; every rank must call it."""
    losses, predictions = [0.0], [0.0]
    for chunk in samples.chunks():
        logit = chunk.logit.double()
        # Precise for any logit: a difference of large numbers never occurs, and 1 - p is never taken.
        losses.append(-float(functional.logsigmoid(torch.where(chunk.label, logit, -logit)).sum()))
        predictions.append(float(logit.sigmoid().sum()))
    local = ranks.gather_numbers(math.fsum(losses), math.fsum(predictions))
    return Likelihood(*(math.fsum(parts) for parts in zip(*local, strict=True)))


@dataclass(frozen=True)
class Evaluation:
    """Metrics over all samples of all ranks; nan where a metric is not defined."""

    auc: float
    """Area under the ROC curve; equal scores count half. nan without positives or without negatives."""
    gauc: float
    """Mean AUC of users, weighted by their samples; nan where no user has both positives and negatives."""
    log_loss: float
    """Mean of -log of the probability given to the label, natural logarithm; nan without samples."""
    normalized_entropy: float
    """Log loss over that of always predicting the share of positives; nan without positives or without negatives."""
    calibration: float
    """Mean prediction over the share of positives; nan without positives."""
    samples: int
    positives: int
    users: int
    """Different users, those without an AUC of their own included."""


NOT_EVALUATED = Evaluation(math.nan, math.nan, math.nan, math.nan, math.nan, samples=0, positives=0, users=0)
"""Metrics where there is nothing to evaluate."""


class Metrics:
    """Collects what a rank evaluates: 13 bytes a sample, on the CPU.

    Example::

        metrics = Metrics()
        for batch in batches:
            metrics.add(user_id_N, label_N, logit_N)
        evaluation = metrics.compute()
    """

    def __init__(self) -> None:
        self._samples = EvaluatedSamples()

    def add(self, user_id_N: Tensor, label_N: Tensor, logit_N: Tensor) -> None:
        """Append a batch of any size, also 0; tensors on any device.

        Wrong values raise no error here but in `compute`, where all ranks meet: none is left waiting for another.

        Args:
            user_id_N: (N,) int64.
            label_N: (N,) float32, 0 or 1.
            logit_N: (N,) float32.
        """
        self._samples.add(user_id_N, label_N, logit_N)

    def compute(self, group: dist.ProcessGroup | None = None) -> Evaluation:
        """Return the metrics over all ranks, the same on each; every rank must call it, also one without samples.

        No rank receives all samples: they are spread anew, by score and by user. More can be added afterwards.

        Args:
            group: gloo, or NCCL on the current CUDA device. None: the default group or, without one, this process
                alone.

        Raises:
            UserError: logits that are not finite or labels other than 0 and 1, on any rank; raised on all ranks.
        """
        ranks = Ranks(group)
        self._check(ranks)
        chunks = list(self._samples.chunks())
        # Positives and negatives apart, and an empty tensor first: `cat` needs at least one where a rank has no
        # samples.
        positive = [chunk.logit[chunk.label].to(ranks.device) for chunk in chunks]
        negative = [chunk.logit[~chunk.label].to(ranks.device) for chunk in chunks]
        none = torch.empty(0, device=ranks.device)
        area = auc(torch.cat([none, *positive]), torch.cat([none, *negative]), ranks)
        del positive, negative  # as large as the samples themselves: not needed while the users' are sent
        by_user = grouped_auc(*self._columns(ranks.device), ranks)

        local = len(self._samples), sum(int(chunk.label.sum()) for chunk in chunks)
        samples, positives = (int(sum(parts)) for parts in zip(*ranks.gather_numbers(*local), strict=True))
        # Log loss and calibration need sums alone.
        sums = likelihood(self._samples, ranks)
        log_loss = sums.log_loss / samples if samples else math.nan
        return Evaluation(
            auc=area,
            gauc=by_user.gauc,
            log_loss=log_loss,
            normalized_entropy=log_loss / _entropy(positives, samples) if 0 < positives < samples else math.nan,
            calibration=sums.prediction / positives if positives else math.nan,
            samples=samples,
            positives=positives,
            users=by_user.users,
        )

    def distribution(self, group: dist.ProcessGroup | None = None) -> ScoreDistribution:
        """Return precision-recall curve and histograms over all ranks, for TensorBoard; every rank must call it.

        Args:
            group: the same as for `compute`.

        Raises:
            UserError: logits or labels that `compute` refuses too.
        """
        ranks = Ranks(group)
        self._check(ranks)
        return score_distribution(self._samples, ranks)

    def _columns(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        chunks = list(self._samples.chunks())
        return (
            torch.cat([torch.empty(0, dtype=torch.int64), *(chunk.user_id for chunk in chunks)]).to(device),
            torch.cat([torch.empty(0, dtype=torch.bool), *(chunk.label for chunk in chunks)]).to(device),
            torch.cat([torch.empty(0), *(chunk.logit for chunk in chunks)]).to(device),
        )

    def _check(self, ranks: Ranks) -> None:
        faults = ranks.gather_numbers(self._samples.wrong_logits, self._samples.wrong_labels)
        for what, counts in zip(
            ("logits that are not finite", "labels other than 0 and 1"), zip(*faults, strict=True), strict=True
        ):
            if any(counts):
                where = ", ".join(f"{count} on rank {rank}" for rank, count in enumerate(counts) if count)
                raise UserError(f"cannot evaluate {what}: {where}")


def _entropy(positives: int, samples: int) -> float:
    """Return the log loss of always predicting the share of positives, which is above 0 and below 1."""
    share = positives / samples
    return -(share * math.log(share) + (1 - share) * math.log1p(-share))
