"""Predictions of a model on a split, and their metrics over all ranks.

T = targets of a batch.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import get_unwrapped_module

from embeddings.batch import Batch
from embeddings.loss import labels_of
from embeddings.model import CtrModel
from pipeline.evaluate.metrics import Evaluation, Metrics
from pipeline.evaluate.samples import ScoreDistribution
from pipeline.stream.history_stream import HistoryStream
from schemas.model import Task
from schemas.shards import UNLABELED

MAIN = "label"
"""What the main label's task is called where the settings name none."""


def tasks_of(model: nn.Module) -> tuple[Task, ...]:
    """The tasks of a model that may be sharded; empty: the data's main label is the only one."""
    inner = get_unwrapped_module(model)
    assert isinstance(inner, CtrModel)
    return inner.settings.tasks


def predictions(
    model: nn.Module, stream: HistoryStream, device: torch.device
) -> Iterator[tuple[Batch, tuple[Tensor, ...]]]:
    """Yield an epoch's batches, on the CPU, each with the logits of each task, (T,) float32 on ``device``.

    All ranks must call it and take all batches. The model's parameters and its mode are the same afterwards.
    """
    training = model.training
    model.eval()
    try:
        for batch in stream:
            with torch.no_grad():
                logits = model(batch.to(device, non_blocking=True)).logits
            # The batch as it came, on the CPU: users, labels and items need no way back from the device.
            yield batch, logits
    finally:
        model.train(training)


def evaluate(model: nn.Module, stream: HistoryStream, device: torch.device) -> dict[str, Metrics]:
    """Predict a split from its start; all ranks must call it, and then `Metrics.compute` of what it returns.

    Returns:
        By task, the main one first, as the settings name them; ``label`` where they name none. Targets without a label
        are left out of its metrics; weights of targets are for the loss and change none of them.
    """
    tasks = tasks_of(model)
    metrics = {task.name: Metrics() for task in tasks} or {MAIN: Metrics()}
    # An earlier evaluation has left the stream at a later epoch; the order is the same in each, and ``origin`` shall be
    # too.
    stream.set_epoch(0)
    for batch, logits in predictions(model, stream, device):
        user_id_T = batch.user_id_U[batch.user_T]
        for of_task, label_T, logit_T in zip(metrics.values(), labels_of(batch, tasks), logits, strict=True):
            labeled_T = label_T != UNLABELED
            of_task.add(user_id_T[labeled_T], label_T[labeled_T], logit_T[labeled_T.to(logit_T.device)])
    return metrics


class Validated(NamedTuple):
    """What a validation says of a task."""

    evaluation: Evaluation
    scores: ScoreDistribution


def defined(evaluation: Evaluation) -> dict[str, float | int | None]:
    """Return metrics by name as JSON knows them: None in the place of nan, where one is not defined."""
    return {name: None if math.isnan(value) else value for name, value in asdict(evaluation).items()}


def as_document(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Return the main task's metrics by name as JSON knows them, and below ``tasks`` those of each, if several.

    None in the place of nan, where a metric is not defined.
    """
    documents = {task: defined(evaluation) for task, evaluation in evaluations.items()}
    main = next(iter(documents.values()))
    return {**main, "tasks": documents} if len(documents) > 1 else main
