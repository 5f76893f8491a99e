"""A model on a split: predictions, and metrics over all ranks.

T = targets of a batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from embeddings.batch import Batch
from pipeline.checkpoint.folder import Checkpoint, best_checkpoint, last_checkpoint
from pipeline.checkpoint.loading import load
from pipeline.metrics.evaluation import Evaluation, Metrics
from pipeline.run_folder import RunFolder
from pipeline.sharded_model import sharded_model
from pipeline.stream.history_stream import HistoryStream


@torch.no_grad()
def predictions(model: nn.Module, stream: HistoryStream, device: torch.device) -> Iterator[tuple[Batch, Tensor]]:
    """An epoch's batches, on the CPU, with their logits, float32 (T,) on ``device``.

    All ranks must call it and take all batches. The model's parameters and its mode are the same afterwards.
    """
    training = model.training
    model.eval()
    try:
        for batch in stream:
            with torch.no_grad():
                logit_T = model(batch.to(device, non_blocking=True)).logit_T
            yield batch, logit_T
    finally:
        model.train(training)


def evaluate(model: nn.Module, stream: HistoryStream, device: torch.device) -> Metrics:
    """Predict a split from its start; all ranks must call it, and then compute the metrics."""
    metrics = Metrics()
    stream.set_epoch(0)
    for batch, logit_T in predictions(model, stream, device):
        metrics.add(batch.user_id_U[batch.user_T], batch.label_T, logit_T)
    return metrics


def as_document(evaluation: Evaluation) -> dict[str, Any]:
    """By name, as JSON knows it: None where a metric is not defined."""
    return {name: None if value != value else value for name, value in asdict(evaluation).items()}


def choose_checkpoint(run: RunFolder, which: str) -> Checkpoint:
    """The ``best`` or the ``last`` checkpoint of a run; best is the last one where none was validated.

    Raises:
        ValueError: the run has no checkpoint.
    """
    found = best_checkpoint(run.checkpoints) if which == "best" else None
    found = found or last_checkpoint(run.checkpoints)
    if found is None:
        raise ValueError(f"{run.path}: no checkpoint yet; train first")
    return found


def load_model(model: nn.Module, checkpoint: Path) -> None:
    """Load a model's parameters and nothing else; all ranks must call it.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    state = {"model": model.state_dict()}
    load(state, checkpoint)
    model.load_state_dict(state["model"])


@contextmanager
def opened_run(
    folder: Path, split: str, which: str, data: Path | None, device: torch.device
) -> Iterator[tuple[nn.Module, HistoryStream]]:
    """The model of a run's checkpoint, and the stream of a split for this rank; all ranks must call it.

    Args:
        folder: of the run.
        split: ``train``, ``validation`` or ``test``.
        which: ``best`` or ``last`` checkpoint.
        data: the data set; None: the one that the run was trained on.
        device: of this rank.

    Raises:
        ValueError: run, checkpoint and data do not fit each other.
    """
    run = RunFolder(folder)
    settings, checkpoint = run.settings(), choose_checkpoint(run, which)
    with HistoryStream(
        data or run.data_set(),
        split,
        settings.stream,
        seed=settings.seed,
        shuffle=False,
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        pin_memory=device.type == "cuda",
    ) as stream:
        data_set = stream.data_set
        run.check_dictionaries(data_set.folder, data_set.fingerprint, data_set.dictionaries())
        model = sharded_model(settings, data_set.manifest, device)
        load_model(model, checkpoint.path)
        yield model, stream


def evaluate_run(folder: Path, split: str, which: str, data: Path | None, device: torch.device) -> Evaluation:
    """The metrics of a run's checkpoint on a split; arguments and errors as `opened_run`."""
    with opened_run(folder, split, which, data, device) as (model, stream):
        return evaluate(model, stream, device).compute()
