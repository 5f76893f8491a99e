"""Time of training steps on gloo ranks, on made-up batches of a known shape.

T = targets, M = behaviours of all users.
"""

import time
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from benchmarks.gloo_ranks import on_gloo_ranks
from embeddings.batch import Batch, History
from embeddings.sizes import DataSizes
from schemas.train import TrainSettings

TARGETS_PER_USER = 4
"""Targets that share a history, in the batches here."""


@dataclass(frozen=True)
class StepTask:
    """A training step to be timed."""

    settings: TrainSettings
    sizes: DataSizes
    steps: int = 8
    warmup: int = 2


def step_seconds(task: StepTask, ranks: int) -> float:
    """Median seconds of a step, of the slower rank.

    Raises:
        RuntimeError: a rank failed or did not end in time.
    """
    return max(on_gloo_ranks(ranks, measured_step, task))


def measured_step(task: StepTask) -> float:
    """Median seconds of a step; all ranks must call it."""
    from embeddings.initialization import initialize
    from embeddings.loss import click_loss
    from embeddings.models import build_model
    from embeddings.sharding import make_plan, shard
    from pipeline.train.dense_optimizer import DenseOptimizer

    device, settings = torch.device("cpu"), task.settings
    model = build_model(settings.model, task.sizes, torch.device("meta"))
    bags = settings.stream.batch_size * (1 + sum(settings.model.retrieved.values()))
    sharded = shard(model, device, make_plan(model, device, bags))
    initialize(sharded, seed=1)
    optimizer = DenseOptimizer(sharded, settings.dense)
    batch = made_up_batch(task, seed=dist.get_rank())
    times = []
    for _ in range(task.warmup + task.steps):
        dist.barrier()
        began = time.perf_counter()
        optimizer.zero_grad()
        click_loss(sharded(batch), batch.label_T).backward()
        optimizer.step()
        times.append(time.perf_counter() - began)
    return median(times[task.warmup :])


def made_up_batch(task: StepTask, seed: int) -> Batch:
    """Random ids; `TARGETS_PER_USER` targets of a user see the same window of N behaviours."""
    draw = torch.Generator().manual_seed(seed)
    targets = task.settings.stream.batch_size
    users = -(-targets // TARGETS_PER_USER)
    user_T = torch.arange(targets) // TARGETS_PER_USER

    def ids(count: int, size: int) -> torch.Tensor:
        return torch.randint(1, count + 1, (size,), generator=draw, dtype=torch.int32)

    histories = {}
    for name, length in task.sizes.lengths.items():
        offset_U = torch.arange(users + 1) * length
        histories[name] = History(
            item_M=ids(task.sizes.items, users * length),
            category_M=ids(task.sizes.categories, users * length),
            timestamp_M=torch.arange(users * length),
            behavior_M=ids(task.sizes.behaviors, users * length) if task.sizes.behaviors else None,
            scene_M=ids(task.sizes.scenes, users * length) if task.sizes.scenes else None,
            offset_U=offset_U,
            start_T=offset_U[user_T],
            end_T=offset_U[user_T + 1],
        )
    return Batch(
        histories=histories,
        user_T=user_T,
        user_id_U=torch.arange(users),
        item_T=ids(task.sizes.items, targets),
        category_T=ids(task.sizes.categories, targets),
        timestamp_T=torch.full((targets,), 10**9),
        scene_T=ids(task.sizes.scenes, targets) if task.sizes.scenes else None,
        label_T=torch.randint(0, 2, (targets,), generator=draw).float(),
        origin="made up",
    )
