"""Sums of log loss and of predictions, in float64 from logits."""

import math
from typing import NamedTuple

import torch
from torch.nn import functional

from pipeline.metrics.ranks import Ranks
from pipeline.metrics.samples import Samples


class Likelihood(NamedTuple):
    """Sums over all samples of all ranks."""

    log_loss: float
    """Of -log of the probability that the prediction gave to the label."""
    prediction: float
    """Of the predicted probabilities."""


def likelihood(samples: Samples, ranks: Ranks) -> Likelihood:
    """The sums, the same on each rank; every rank must call this."""
    losses, predictions = [0.0], [0.0]
    for chunk in samples.chunks():
        logit = chunk.logit.double()
        # Precise for any logit: a difference of large numbers never occurs, and 1 - p is never taken.
        losses.append(-float(functional.logsigmoid(torch.where(chunk.label, logit, -logit)).sum()))
        predictions.append(float(logit.sigmoid().sum()))
    local = ranks.gather_numbers(math.fsum(losses), math.fsum(predictions))
    return Likelihood(*(math.fsum(parts) for parts in zip(*local, strict=True)))
