"""Predictions of a model on a split, and their metrics over all ranks.

T = targets of a batch.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from embeddings.batch import Batch
from pipeline.evaluate.metrics import Evaluation, Metrics
from pipeline.stream.history_stream import HistoryStream


def predictions(model: nn.Module, stream: HistoryStream, device: torch.device) -> Iterator[tuple[Batch, Tensor]]:
    """Yield an epoch's batches, on the CPU, each with its logits, (T,) float32 on ``device``.

    All ranks must call it and take all batches. The model's parameters and its mode are the same afterwards.
    """
    training = model.training
    model.eval()
    try:
        for batch in stream:
            with torch.no_grad():
                logit_T = model(batch.to(device, non_blocking=True)).logit_T
            # The batch as it came, on the CPU: users, labels and items need no way back from the device.
            yield batch, logit_T
    finally:
        model.train(training)


def evaluate(model: nn.Module, stream: HistoryStream, device: torch.device) -> Metrics:
    """Predict a split from its start; all ranks must call it, and then `Metrics.compute` of what it returns."""
    metrics = Metrics()
    # An earlier evaluation has left the stream at a later epoch; the order is the same in each, and ``origin`` shall be
    # too.
    stream.set_epoch(0)
    for batch, logit_T in predictions(model, stream, device):
        metrics.add(batch.user_id_U[batch.user_T], batch.label_T, logit_T)
    return metrics


def as_document(evaluation: Evaluation) -> dict[str, Any]:
    """Return the metrics by name as JSON knows them: None in the place of nan, where a metric is not defined."""
    return {name: None if math.isnan(value) else value for name, value in asdict(evaluation).items()}
