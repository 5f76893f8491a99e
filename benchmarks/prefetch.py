"""Training steps with and without prefetch of the next batch's search, side by side on two gloo ranks."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torchrec.distributed.train_pipeline import TrainPipelineBase

from benchmarks.plan_estimates import SIZES
from embeddings.sizes import DataSizes
from pipeline.planning.calibration import RANKS
from pipeline.planning.measuring import StepTask, made_up_batch, on_gloo_ranks
from schemas.settings import load_settings
from schemas.train import TrainSettings

ROUNDS, STEPS = 5, 6
"""Each side makes so many steps in turn, so many times."""


@dataclass(frozen=True)
class PrefetchFigures:
    """Times of steps of one size, medians of the slower rank."""

    targets: int
    length: int
    dim: int
    plain_ms: float
    prefetch_ms: float
    ratio: float
    """Plain over prefetch: above 1, prefetch is faster."""


def measure() -> Iterator[PrefetchFigures]:
    """Time a step of each size.

    Raises:
        RuntimeError: a process failed, or the losses of both sides differ.
    """
    for size in SIZES:
        settings = load_settings(
            TrainSettings,
            overrides=[
                f"stream.batch_size={size.targets}",
                f"stream.history_length={size.length}",
                f"model.attention.dim={size.dim}",
                f"model.representation.dim={size.dim}",
                f"model.retrieved.history={size.retrieved}",
            ],
        )
        sizes = DataSizes.counted(items=1_000_000, categories=10_000, lengths={"history": size.length})
        plain, prefetch = (
            max(times) * 1e3 for times in zip(*on_gloo_ranks(RANKS, _step, settings, sizes), strict=True)
        )
        yield PrefetchFigures(
            size.targets, size.length, size.dim, round(plain, 1), round(prefetch, 1), round(plain / prefetch, 3)
        )


def _step(settings: TrainSettings, sizes: DataSizes) -> tuple[float, float]:
    """Median seconds of a plain step and of one with prefetch; all ranks must call it."""
    from embeddings.initialization import initialize
    from embeddings.models import build_model
    from embeddings.sharding import make_plan, shard
    from pipeline.train.optimizer import DenseOptimizer
    from pipeline.train.pipeline import ClickTask, SearchPrefetchPipeline

    device, task = torch.device("cpu"), StepTask(settings, sizes)
    batches = [made_up_batch(task, seed=10 * dist.get_rank() + step) for step in range(STEPS)]
    sides = []
    for prefetch in (False, True):
        # A model of its own for each side, with the same first weights: their losses must stay equal to the last bit.
        model = build_model(settings.model, sizes, torch.device("meta"))
        sharded = shard(model, device, make_plan(model, device, batch_size=1))
        initialize(sharded, seed=1)
        optimizer = DenseOptimizer(sharded, settings.dense)
        kind = SearchPrefetchPipeline if prefetch else TrainPipelineBase
        sides.append(kind(sharded if prefetch else ClickTask(sharded), optimizer, device))
    times: tuple[list[float], list[float]] = ([], [])
    # The first round is not counted: kernels are compiled in it.
    for _ in range(1 + ROUNDS):
        losses: tuple[list[float], list[float]] = ([], [])
        for side, pipeline in enumerate(sides):
            todo = iter(batches)
            for _ in batches:
                dist.barrier()
                began = time.perf_counter()
                losses[side].append(float(pipeline.progress(todo).loss))
                times[side].append(time.perf_counter() - began)
            pipeline.reset()
        if losses[0] != losses[1]:
            raise RuntimeError(f"the losses differ: {losses}")
    return median(times[0][STEPS:]), median(times[1][STEPS:])
