"""Trainers in a test's process group: the same global batches for any number of ranks, no files but checkpoints."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from embeddings.initialization import initialize
from embeddings.sharding import sharded_model
from pipeline.runs.checkpoint_writer import CheckpointWriter
from pipeline.stream.data_set import DataSet
from pipeline.train.trainer import Trainer
from schemas.train import TrainSettings
from tests.toy_batch import part, toy_batch

CPU = torch.device("cpu")


class SplitBatches:
    """Stands for a stream: the same global batches for any number of ranks."""

    steps_per_epoch, waited_s = 6, 0.0

    def __init__(self) -> None:
        self.epoch = self.step = 0

    def __iter__(self) -> Iterator[Any]:
        for step in range(self.step, self.steps_per_epoch):
            yield part(toy_batch(step, targets=24), dist.get_rank(), dist.get_world_size())

    def steps_of(self, epoch: int) -> int:
        return self.steps_per_epoch

    def state_at(self, epoch: int, step: int) -> dict[str, Any]:
        return {"epoch": epoch, "step": step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.step = state["epoch"], state["step"]


class Losses:
    """Stands for a report."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def step(self, step: int, agreed: Any) -> None:
        self.losses.append(agreed.loss)

    def point(self, *arguments: Any) -> None:
        pass

    def flush(self) -> None:
        pass


class Never:
    received = False


def trainer_of(settings: TrainSettings, data: Path) -> Trainer:
    model = sharded_model(settings, DataSet.open(data).manifest, CPU)
    initialize(model, settings.seed)
    return Trainer(settings, model, SplitBatches(), None, CPU)  # type: ignore[arg-type]


def train_and_save(settings: TrainSettings, data: Path, folder: Path) -> list[float]:
    """Train an epoch, with its checkpoints in ``folder``; returns the losses."""
    report, trainer = Losses(), trainer_of(settings, data)
    with CheckpointWriter(folder, 9, {}) as writer:
        trainer.train(writer, report, Never())  # type: ignore[arg-type]
    dist.barrier()
    return report.losses
