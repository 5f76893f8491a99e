"""`dare plan --calibrate`: the figures of this machine that a dry run needs, measured on two processes at a time.

B = ids of a lookup, T = targets, W = (target, behaviour) pairs, M = behaviours, R = rows, D = dim.
"""

import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from statistics import geometric_mean, median
from typing import Any

import psutil
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from omegaconf import OmegaConf
from torch.nn.functional import embedding

from embeddings.initialization import initialize
from embeddings.layers.mlp import MLP
from embeddings.layers.scoring import ScaledDotProduct
from embeddings.models import build_model
from embeddings.search.sharded import ShardedTopK
from embeddings.search.topk.api import top_k
from embeddings.search.topk.inputs import PartKind, ScorePart, TopKInputs
from embeddings.sharding import make_plan, shard
from embeddings.sizes import DataSizes
from pipeline.planning.dry_run import dry_run
from pipeline.planning.measuring import (
    TARGETS_PER_USER,
    StepTask,
    TrafficCounter,
    made_up_batch,
    measured_step,
    on_gloo_ranks,
)
from pipeline.planning.traffic import FLOAT
from schemas.cluster import ClusterSettings, CollectiveShares, Costs, Link
from schemas.documents import yaml_document
from schemas.plan import PlanSettings
from schemas.settings import load_settings

RANKS = 2
DIM, ROWS, BAGS = 32, 1_000_000, 8_000
SENT = (1 << 18, 1 << 20, 4 << 20, 16 << 20)
"""Bytes to the other rank, over which a collective's bandwidth is averaged."""

ROUNDS, ROUND_NS = 5, 50_000_000
"""How often a measurement is repeated, and how long it takes at least."""

LONG = ("stream.batch_size=128", "stream.history_length=1000", "model.retrieved.history=4")
TINY = ("stream.batch_size=8", "stream.history_length=20", "model.retrieved.history=4")


def calibrated() -> ClusterSettings:
    """Measure this machine as a cluster of two ranks.

    Raises:
        RuntimeError: a process failed.
    """
    figures = on_gloo_ranks(RANKS, _figures)
    # Both ranks measure at once, because in a step both are busy at once: what they share, they share here too.
    measured = {name: median([figure[name] for figure in figures]) for name in figures[0]}
    load = os.getloadavg()[0]
    cluster = ClusterSettings(
        name="this-machine",
        device="cpu",
        device_name=f"{_processor()}, {psutil.cpu_count(logical=True)} logical cores",
        nodes=1,
        devices_per_node=RANKS,
        host_memory=psutil.virtual_memory().total,
        memory_bandwidth=measured["memory_bandwidth"],
        # One machine: the second link is never used, but must be there.
        within_node=Link(bandwidth=measured["all_to_all"], latency=measured["latency"]),
        between_nodes=Link(bandwidth=measured["all_to_all"], latency=measured["latency"]),
        collectives=CollectiveShares(
            **{name: measured[name] / measured["all_to_all"] for name in ("reduce_scatter", "all_gather", "all_reduce")}
        ),
        dense_rate=measured["dense_rate"],
        costs=Costs(
            **{name: measured[name] for name in ("row", "update", "bag", "id", "pair", "cross", "input")},
            # Not known yet: measured below, with the other figures as they are.
            behavior=0,
            scan=measured["pair"],
            step=0,
        ),
        measured=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC on {RANKS} processes, load average {load:.1f}",
    )
    # Long histories and few targets: hardly anything else than behaviours travels.
    settings, sizes = plan_settings(cluster, LONG)
    behavior = median(on_gloo_ranks(RANKS, _behavior, StepTask(settings, sizes), cluster.within_node))
    cluster = cluster.model_copy(update={"costs": cluster.costs.model_copy(update={"behavior": behavior})})
    # What a step of next to nothing takes longer than the sum of its parts is what any step costs.
    settings, sizes = plan_settings(cluster, TINY)
    seconds = max(on_gloo_ranks(RANKS, measured_step, StepTask(settings, sizes, steps=15)))
    rest = seconds * 1e9 - dry_run(settings, sizes).step.ms * 1e6
    return cluster.model_copy(update={"costs": cluster.costs.model_copy(update={"step": max(0.0, rest)})})


def plan_settings(cluster: ClusterSettings, overrides: tuple[str, ...]) -> tuple[PlanSettings, DataSizes]:
    """Settings and sizes of a dry run of the steps that `pipeline.planning.measuring` times.

    Args:
        cluster: to plan for.
        overrides: other settings, as ``key=value``.
    """
    settings = load_settings(
        PlanSettings,
        [],
        [f"workload.targets_per_user={TARGETS_PER_USER}", *overrides],
        {"cluster": cluster.model_dump()},
    )
    return settings, DataSizes.counted(
        items=200_000, categories=5_000, lengths={"history": settings.stream.history_length}
    )


def cluster_text(cluster: ClusterSettings) -> str:
    """A cluster as the YAML file that ``dare plan --topology`` reads, with figures of three digits."""
    values = cluster.model_dump(mode="json", exclude_none=True)

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(part) for key, part in value.items()}
        return float(f"{value:.3g}") if isinstance(value, float) else value

    text = OmegaConf.to_yaml(OmegaConf.create(rounded(values)))
    return yaml_document(f"# Written by `dare plan --calibrate`.\n{text}")


def _figures() -> dict[str, float]:
    """What this rank measures while the other one measures the same."""
    bandwidth = _memory_bandwidth()
    rate = _dense_rate()
    return {
        "memory_bandwidth": bandwidth,
        "dense_rate": rate,
        **_lookups(bandwidth),
        **_pairs(bandwidth, rate),
        **_collectives(),
        "input": _input(rate),
    }


def _memory_bandwidth() -> float:
    """GB/s, reads and writes of copies of the sizes that a step makes."""
    speeds = []
    for size in SENT:
        source = torch.randn(size // 4)
        target = torch.empty_like(source)
        speeds.append(2 * size / _ns(partial(target.copy_, source)))
    return geometric_mean(speeds)


def _lookups(bandwidth: float) -> dict[str, float]:
    """Nanoseconds of a row, an update and a bag, the bytes aside, in FBGEMM's fused lookup."""
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU)], optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD
    )
    row_B = torch.randint(0, ROWS, (BAGS,))
    full, empty = torch.arange(BAGS + 1), torch.zeros(BAGS + 1, dtype=torch.int64)
    none = row_B[:0]
    # What bytes alone would take is taken off everywhere below: the model adds it for the sizes at hand. Noise must not
    # make a cost negative, hence the least values.
    output_ns = 2 * BAGS * DIM * 4 / bandwidth
    row_bytes = DIM * 4 / bandwidth

    def both(ids: torch.Tensor, offsets: torch.Tensor) -> Callable[[], None]:
        return lambda: table(ids, offsets).sum().backward()

    with torch.no_grad():
        # With ids and without: the difference is what the ids cost, the rest is what the bags cost.
        forward_full, forward_empty = _ns(lambda: table(row_B, full)), _ns(lambda: table(none, empty))
    backward_full, backward_empty = _ns(both(row_B, full)) - forward_full, _ns(both(none, empty)) - forward_empty
    # What an id costs beside the lookup: finding which are equal, and giving each id the row that came back.
    narrow_B, rows_BD = row_B.to(torch.int32), torch.randn(BAGS, DIM, requires_grad=True)
    _, slot_B = torch.unique(narrow_B, return_inverse=True)
    there = _ns(lambda: torch.unique(narrow_B, return_inverse=True))
    back = _ns(lambda: embedding(slot_B, rows_BD).sum().backward())
    return {
        "row": max(1.0, (forward_full - forward_empty) / BAGS - row_bytes),
        "update": max(1.0, (backward_full - backward_empty) / BAGS - 2 * row_bytes),
        "bag": max(0.1, (forward_empty - output_ns) / BAGS),
        "id": max(0.1, (there + back) / BAGS - 2 * 2 * DIM * FLOAT / bandwidth),
    }


def _behavior(task: StepTask, link: Link) -> float:
    """Nanoseconds of a behaviour's way to its shard in search there, the bytes aside."""
    model = build_model(task.settings.model, task.sizes, torch.device("meta"))
    initialize(shard(model, torch.device("cpu"), make_plan(model, torch.device("cpu"), batch_size=1)), seed=1)
    batch = made_up_batch(task, seed=dist.get_rank())
    tables = model.tables.inherent["attention"]
    retrieved, sides = task.settings.model.retrieved, model.tables.sides
    search = ShardedTopK(tables, tables, ScaledDotProduct(), retrieved, model.sizes, sides)
    ns = _ns(lambda: search.input_dist(search.create_context(), batch).wait().wait(), together=True)
    with TrafficCounter() as traffic:
        search.input_dist(search.create_context(), batch).wait()
    # Two collectives, and the bytes, are what the model counts as traffic.
    sent = traffic.bytes / link.bandwidth + 2 * link.latency * 1e3
    return max(0.1, float(ns - sent) / len(batch.histories["history"].item_M))


def _pairs(bandwidth: float, rate: float) -> dict[str, float]:
    """Nanoseconds of scoring and ranking a pair, and of a cross feature's part."""
    # Four targets of a user share a window, as in the steps that are measured.
    users, targets, length = 32, 128, 1000
    rows_RD = torch.randn(users * length, DIM)
    start_T = torch.arange(targets) // (targets // users) * length
    end_T, query_TD = start_T + length, torch.randn(targets, DIM)
    ids_M = torch.arange(users * length)

    def search(*parts: ScorePart) -> float:
        inputs = TopKInputs(rows_RD, ids_M, start_T, end_T, query_TD, 20, parts, longest=length)
        return _ns(lambda: top_k(inputs)) / (targets * length)

    plain = search()
    # A cross feature: a small table, one query for all targets.
    position = ScorePart(PartKind.POSITION, rows_RD[: length + 1], rows_RD[:1], None, end_T)
    # The products are counted by themselves.
    products = 2 * DIM / (rate * 1e3)
    return {"pair": max(0.1, plain - products), "cross": max(0.1, search(position) - plain)}


def _collectives() -> dict[str, float]:
    """GB/s sent in each collective, and microseconds of one that carries next to nothing."""

    def collective(name: str, count: int) -> Callable[[], object]:
        # ``count`` floats to each rank: in every collective the same number of bytes goes to the other one.
        both, one = torch.zeros(RANKS * count), torch.zeros(count)
        outcome = torch.empty_like(both)
        return {
            "all_to_all": lambda: dist.all_to_all_single(outcome, both),
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(one, both),
            "all_gather": lambda: dist.all_gather_into_tensor(outcome, one),
            # A rank of two sends as many bytes as the tensor has: half of them to be added up, and half of the sums.
            "all_reduce": lambda: dist.all_reduce(one),
        }[name]

    figures = {"latency": _ns(collective("all_to_all", 8), together=True) / 1e3}
    for name in ("all_to_all", "reduce_scatter", "all_gather", "all_reduce"):
        speeds = []
        for sent in SENT:
            ns = _ns(collective(name, sent // 4), together=True)
            speeds.append(sent / max(1.0, ns - figures["latency"] * 1e3))
        figures[name] = geometric_mean(speeds)
    return figures


def _dense_rate() -> float:
    """TFLOP/s of a layer of the prediction, forwards and backwards."""
    # 192 inputs: what DARE predicts from with two features of 32 floats. 3 x 2: forwards, and twice backwards.
    layer, values = torch.nn.Linear(192, 200), torch.randn(1024, 192, requires_grad=True)
    return 3 * 2 * 1024 * 192 * 200 / _ns(lambda: layer(values).sum().backward()) / 1e3


def _input(rate: float) -> float:
    """Nanoseconds of an input of the prediction, the products aside."""
    inputs, targets = 192, 512
    mlp, values = MLP(inputs, (200, 80)), torch.randn(targets, inputs, requires_grad=True)
    parameters = sum(weight.numel() for weight in mlp.parameters())
    # Its sums over ranks are counted as traffic: here they are small.
    all_ns = _ns(lambda: mlp(values).sum().backward(), together=True)
    return max(1.0, (all_ns - 3 * 2 * parameters * targets / (rate * 1e3)) / (inputs * targets))


def _ns(work: Callable[[], object], together: bool = False) -> float:
    """Nanoseconds of a piece of work: the median of rounds, which all ranks begin together.

    A round is long enough to suffer from what else runs on the machine, as a training step does.

    Args:
        work: to be timed.
        together: all ranks do the work equally often, as collectives need it.
    """
    work()
    dist.barrier()
    began = time.perf_counter_ns()
    work()
    repeats = torch.tensor([max(1, int(ROUND_NS / max(1, time.perf_counter_ns() - began)))])
    if together:
        dist.all_reduce(repeats, dist.ReduceOp.MIN)
    times = []
    for _ in range(ROUNDS):
        if together:
            dist.barrier()
        began = time.perf_counter_ns()
        for _ in range(int(repeats)):
            work()
        times.append((time.perf_counter_ns() - began) / int(repeats))
    return float(median(times))


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
