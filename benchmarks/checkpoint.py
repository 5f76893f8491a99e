"""Bytes and seconds of full and of delta checkpoints, of the same model after some steps, on a disk of this machine."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from embeddings.sizes import DataSizes
from pipeline.planning.measuring import StepTask, made_up_batch, on_gloo_ranks
from schemas.settings import load_settings
from schemas.train import TrainSettings


@dataclass(frozen=True)
class CheckpointFigures:
    """A checkpoint; seconds are those of the slower rank."""

    kind: str
    """``full`` or ``delta``."""
    ranks: int
    rows: int
    """Rows of each of the two item tables."""
    steps: int
    """Steps since the last full one."""
    mib: float
    copy_s: float
    """What training waits for."""
    write_s: float
    """From the call until the checkpoint has its name."""
    load_s: float
    """Into a model that is there; of a delta, its full one included."""


def measure(ranks: int, items: int, batch: int, steps: Sequence[int]) -> list[CheckpointFigures]:
    """Save and load a full checkpoint, and a delta after each number of steps; ids are drawn uniformly.

    Args:
        ranks: processes of this machine, a thread each.
        items: rows of each item table.
        batch: targets of a step over all ranks.
        steps: numbers of steps since the full checkpoint, rising.

    Raises:
        RuntimeError: a process failed, or what was loaded is not what was saved.
    """
    settings = load_settings(
        TrainSettings, overrides=[f"stream.batch_size={batch // ranks}", "stream.history_length=50"]
    )
    sizes = DataSizes.counted(items=items, categories=10_000, lengths={"history": 50})
    with tempfile.TemporaryDirectory() as folder:
        of_ranks = on_gloo_ranks(ranks, _measure, settings, sizes, Path(folder), list(steps), timeout_s=7200)
    figures = list[CheckpointFigures]()
    for cases in zip(*of_ranks, strict=True):
        kind, number, mib, *_ = cases[0]
        copy_s, write_s, load_s = (
            round(max(seconds), 3) for seconds in zip(*(case[3:] for case in cases), strict=True)
        )
        figures.append(CheckpointFigures(kind, ranks, items, number, mib, copy_s, write_s, load_s))
    return figures


def _measure(settings: TrainSettings, sizes: DataSizes, folder: Path, numbers: list[int]) -> list[tuple[Any, ...]]:
    from embeddings.initialization import initialize
    from embeddings.models import build_model
    from embeddings.sharding import make_plan, shard
    from pipeline.runs.checkpoint import final_path
    from pipeline.runs.checkpoint_files import load
    from pipeline.runs.checkpoint_writer import CheckpointWriter
    from pipeline.runs.delta import DeltaState
    from pipeline.train.optimizer import DenseOptimizer
    from pipeline.train.pipeline import SearchPrefetchPipeline

    device, task = torch.device("cpu"), StepTask(settings, sizes)
    model = build_model(settings.model, sizes, torch.device("meta"))
    sharded = shard(model, device, make_plan(model, device, batch_size=1))
    initialize(sharded, seed=1)
    optimizer = DenseOptimizer(sharded, settings.dense)
    optimizer.init_state()
    pipeline = SearchPrefetchPipeline(sharded, optimizer, device)

    def state() -> dict[str, Any]:
        parts = {"model": sharded, "table_optimizer": sharded.fused_optimizer, "dense_optimizer": optimizer}
        return {name: part.state_dict() for name, part in parts.items()}

    figures, done = list[tuple[Any, ...]](), 0
    with CheckpointWriter(folder, 9, {}, DeltaState(sharded, None)) as writer:
        for number in (0, *numbers):
            todo = (made_up_batch(task, 1000 * dist.get_rank() + step, 1) for step in range(done, number))
            for _ in range(done, number):
                pipeline.progress(todo)
            pipeline.reset()
            done = number
            dist.barrier()
            began = time.perf_counter()
            writer.save(state(), 1 + number, None, full=number == 0)
            copied = time.perf_counter() - began
            writer.wait()
            dist.barrier()
            written = time.perf_counter() - began
            path = final_path(folder, 1 + number)
            size = sum(file.stat().st_size for file in path.iterdir())
            before, began = _sums(state()), time.perf_counter()
            load(state(), path)
            dist.barrier()
            loaded = time.perf_counter() - began
            if _sums(state()) != before:
                raise RuntimeError("what was loaded is not what was saved")
            kind = "delta" if number else "full"
            figures.append((kind, number, round(size / 2**20, 1), copied, written, loaded))
    return figures


def _sums(state: dict[str, Any]) -> list[int]:
    """A sum over the bits of each tensor of this rank."""
    from torch.distributed._shard.sharded_tensor.api import ShardedTensor
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict

    found = []
    for value in flatten_state_dict(state)[0].values():
        tensors = [shard.tensor for shard in value.local_shards()] if isinstance(value, ShardedTensor) else [value]
        found += [int(tensor.detach().contiguous().view(torch.int32).sum()) for tensor in tensors]
    return found
