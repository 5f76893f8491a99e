"""What a step really takes on gloo ranks of this machine: its time, and the bytes that a rank sends.

Steps are made on made-up batches of a known shape, in fresh processes of one thread each.

T = targets, M = behaviours of all users, U = users, N = behaviours of a user.
"""

import multiprocessing
import os
import socket
import time
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from embeddings.batch import Bags, Batch, History
from embeddings.sizes import DataSizes, FeatureSize
from schemas.shards import Side
from schemas.train import TrainSettings


def on_gloo_ranks(ranks: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 300) -> list[Any]:
    """Call ``function(*arguments)`` on each rank of a gloo group of new processes.

    Args:
        ranks: number of processes.
        function: of a module's top level; what it returns must pickle.
        arguments: must pickle.
        timeout_s: seconds until the processes are ended.

    Returns:
        What the ranks returned, in no order.

    Raises:
        RuntimeError: a rank failed or did not end in time.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        # The kernel chooses a port that is free. Another process might take it before the ranks do; then the start
        # fails.
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # `put` writes to a pipe in the rank itself: what ranks return must fit into the pipe's buffer, because it is read
    # only when they have ended.
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_rank, args=(rank, ranks, port, results, function, arguments)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    until = time.monotonic() + timeout_s
    try:
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
    codes = [process.exitcode for process in processes]
    if codes != [0] * ranks:
        raise RuntimeError(f"processes ended with {codes}")
    return [results.get() for _ in range(ranks)]


def _rank(
    rank: int, ranks: int, port: int, results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import logging

    from embeddings.distributed.process_group import leave, process_group, rank_environment

    os.environ |= rank_environment(rank, ranks, port)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("torchrec", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # One thread for each rank: ranks side by side would fight for the cores.
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")):
        results.put(function(*arguments))
    leave(0)


class TrafficCounter(TorchDispatchMode):
    """Counts the bytes that this rank sends to others while it is active.

    A collective counts as what its best algorithm sends: gloo's own may send more.

    Example::

        with TrafficCounter() as traffic:
            model(batch)
        print(traffic.bytes)
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0
        """Bytes so far."""

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), keywords: Mapping[str, Any] | None = None
    ) -> Any:
        name = function.name()
        if name.startswith("c10d::"):
            self.bytes += _sent(name.removeprefix("c10d::"), arguments)
        return function(*arguments, **(keywords or {}))


def _sent(collective: str, arguments: Sequence[Any]) -> float:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if collective == "alltoall_base_":
        source, splits = arguments[1], list(arguments[4])
        own = splits[rank] / max(1, sum(splits)) if splits else 1 / ranks  # the part that stays on this rank
        return _bytes(source) * (1 - own)
    # Each rank sends its part to all others.
    if collective == "_allgather_base_":
        return _bytes(arguments[1]) * (ranks - 1)
    # A reduce-scatter and an all-gather of equal parts: of each part but one's own, the values and then the sums.
    if collective == "allreduce_":
        return sum(map(_bytes, arguments[0])) * 2 * (ranks - 1) / ranks
    if collective == "_reduce_scatter_base_":
        return _bytes(arguments[1]) * (ranks - 1) / ranks
    raise AssertionError(f"not known how much {collective} sends")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


TARGETS_PER_USER = 4
"""Targets that share a history, in the batches here."""


@dataclass(frozen=True)
class StepTask:
    """A training step to be timed."""

    settings: TrainSettings
    sizes: DataSizes
    steps: int = 8
    """Steps that are timed."""
    warmup: int = 2
    """Steps before them, in which kernels are compiled and buffers made."""


def step_seconds(task: StepTask, ranks: int) -> float:
    """Time training steps on gloo ranks of this machine.

    Args:
        task: the step.
        ranks: number of processes.

    Returns:
        Median seconds of a step, of the slowest rank.

    Raises:
        RuntimeError: a rank failed or did not end in time.
    """
    seconds: list[float] = on_gloo_ranks(ranks, measured_step, task)
    return max(seconds)


def measured_step(task: StepTask) -> float:
    """Median seconds of a training step on this rank; all ranks must call it."""
    from embeddings.initialization import initialize
    from embeddings.loss import labels_of, task_losses, weighted_sum
    from embeddings.models import build_model
    from embeddings.sharding import make_plan, shard
    from pipeline.train.optimizer import DenseOptimizer

    device, settings = torch.device("cpu"), task.settings
    # The parts of `dare train`, without its stream and its checkpoints.
    model = build_model(settings.model, task.sizes, torch.device("meta"))
    sharded = shard(model, device, make_plan(model, device, settings.stream.batch_size))
    initialize(sharded, seed=1)
    optimizer = DenseOptimizer(sharded, settings.dense)
    # One batch for all steps: rows that it needs are in the cache more often than those of new data would be.
    batch = made_up_batch(task, seed=dist.get_rank())
    times = []
    for _ in range(task.warmup + task.steps):
        dist.barrier()
        began = time.perf_counter()
        optimizer.zero_grad()
        tasks = settings.model.tasks
        weighted_sum(task_losses(sharded(batch), labels_of(batch, tasks)), tasks).backward()
        optimizer.step()
        # From a common start to this rank's end: waiting for the other inside the step is part of it.
        times.append(time.perf_counter() - began)
    return median(times[task.warmup :])


def made_up_batch(task: StepTask, seed: int, targets_per_user: int = TARGETS_PER_USER) -> Batch:
    """A batch of random ids, in which all targets of a user see the same window of N behaviours.

    Args:
        task: says how many targets and behaviours there are.
        seed: of the ids.
        targets_per_user: targets that share a history; the last user may have fewer.
    """
    draw = torch.Generator().manual_seed(seed)
    targets = task.settings.stream.batch_size
    users = -(-targets // targets_per_user)
    user_T = torch.arange(targets) // targets_per_user

    def ids(count: int, size: int) -> torch.Tensor:
        return torch.randint(1, count + 1, (size,), generator=draw, dtype=torch.int32)

    sizes = task.sizes

    def columns(of: Container[Side], size: int, of_targets: bool = False) -> dict[str, Tensor]:
        # An item may have several categories here: only how many there are matters.
        return {
            name: torch.rand(size, generator=draw) if feature.kind == "number" else ids(sizes.values(name) - 1, size)
            for name, feature in sizes.features.items()
            if feature.of in of and (feature.of != "behavior" or feature.target or not of_targets)
        }

    histories = {}
    for name, length in task.sizes.lengths.items():
        # Every user has exactly N behaviours, all of which each target sees: the workload is known to the last pair.
        offset_U = torch.arange(users + 1) * length
        histories[name] = History(
            item_M=ids(task.sizes.items, users * length),
            timestamp_M=torch.arange(users * length),
            features_M=columns(("item", "behavior"), users * length),
            offset_U=offset_U,
            start_T=offset_U[user_T],
            end_T=offset_U[user_T + 1],
        )
    return Batch(
        histories=histories,
        user_T=user_T,
        user_id_U=torch.arange(users),
        item_T=ids(task.sizes.items, targets),
        timestamp_T=torch.full((targets,), 10**9),
        features_T=columns(("item", "behavior", "impression"), targets, of_targets=True),
        features_U=columns(("user",), users),
        bags={name: _bags(size, draw) for name, size in sizes.features.items() if size.kind == "ids"},
        labels_T={"label": torch.randint(0, 2, (targets,), generator=draw).float()},
        origin="made up",
    )


def _bags(size: FeatureSize, draw: torch.Generator) -> Bags:
    """Bags of one to five ids, and the empty one."""
    length_B = torch.randint(1, 6, (size.bags + 1,), generator=draw)
    length_B[0] = 0
    offset_B1 = torch.cat([length_B.new_zeros(1), length_B.cumsum(0)])
    return Bags(offset_B1, torch.randint(1, size.rows + 1, (int(offset_B1[-1]),), generator=draw, dtype=torch.int32))
