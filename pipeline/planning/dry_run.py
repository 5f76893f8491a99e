"""TorchRec's planner on tables that do not exist, and what a step of the planned model costs.

Nothing is measured and no GPU is needed: the model is built on the meta device, and the cluster is a settings file.
"""

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.proposers import GreedyProposer, UniformProposer
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    PlannerError,
    ShardingOption,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ShardingPlan

from embeddings.model import CtrModel, SearchPlace
from embeddings.models import MODELS, build_model
from embeddings.sharding import TableSharder, constraints, fuse_optimizers
from embeddings.sizes import DataSizes
from pipeline.planning.cost_model import StepEstimate, StepModel
from pipeline.planning.planned_tables import PlannedTable, planned_tables
from pipeline.planning.workload import Search, Workload
from schemas.cluster import ClusterSettings
from schemas.plan import PlanSettings

DENSE_COPIES = 5
"""Copies of the dense parameters in memory: weights, gradients, DDP's buckets, Adam's two averages."""


@dataclass(frozen=True)
class Lack:
    """Which memory is too small for a model that does not fit."""

    memory: str
    """``device`` or ``host``."""
    needed: int
    """Bytes that a rank would need if everything were spread as evenly as can be."""
    usable: int
    """Bytes that a rank may plan with."""
    table: str
    """The table that takes most of it."""
    table_bytes: int
    """Bytes that this table takes on a rank."""


@dataclass(frozen=True)
class RankLoad:
    """What a rank holds and does."""

    device_bytes: int
    host_bytes: int
    lookups: float
    """Share of all rows looked up in a step."""


@dataclass(frozen=True)
class DryRun:
    """A model planned on a cluster, or the memory that it lacks."""

    settings: PlanSettings
    sizes: DataSizes
    seconds: float
    """How long the planner took."""
    search: Search
    """Where the search is whose memory is planned for."""
    steps: dict[Search, StepEstimate]
    plan: ShardingPlan | None
    """None: it does not fit."""
    tables: tuple[PlannedTable, ...]
    ranks: tuple[RankLoad, ...]
    lack: Lack | None

    @property
    def searched(self) -> SearchPlace:
        """Where the model searches if it has the choice."""
        return MODELS[self.settings.model.name].searched

    @property
    def feasible(self) -> bool:
        """Whether the model fits."""
        return self.plan is not None

    @property
    def step(self) -> StepEstimate:
        """The step with the search that the memory is planned for."""
        return self.steps[self.search]

    @property
    def samples_per_second(self) -> float:
        """Samples that all ranks together train on in a second."""
        return self.settings.cluster.ranks * self.step.targets / self.step.ms * 1e3


def dry_run(settings: PlanSettings, sizes: DataSizes) -> DryRun:
    """Plan the model on the cluster; no process group, no GPU, no memory for tables.

    Args:
        settings: the model, the stream, the cluster.
        sizes: of the data.

    Returns:
        The plan and its costs; where the model does not fit, what memory lacks.

    Raises:
        UserError: settings that do not fit each other.
    """
    cluster = settings.cluster
    model = build_model(settings.model, sizes, torch.device("meta"))
    search: Search = settings.model.search if model.searched == "shard" else "local"
    # As in training, for the planner counts the optimizers' state where they are fused; it also refuses what the device
    # cannot train.
    fuse_optimizers(model, torch.device(cluster.device))
    work = Workload.of(settings, sizes)
    # The memory beside the tables does not depend on where the planner puts them, so it is known before the plan.
    unplanned = StepModel(model, (), work, cluster)
    # Rough, and small beside tables: dense parameters, activations of the prediction, and rows of the retrieved
    # behaviours as attention keeps them for its backward pass, four bytes a float.
    dense = unplanned.dense_parameters * 4 * DENSE_COPIES + unplanned.inputs * work.targets * 4 * 12
    kept = (work.pairs if unplanned.looks_up_all else work.targets * work.retrieved) * sum(
        sum((model.tables.inherent_dims(name) | model.tables.cross_dims(name)).values())
        for name in model.tables.inherent
    )
    other = round(dense + kept * 4 * 4 + unplanned.search_bytes(search))
    bounds = _bounds(model, work, search, cluster.device)
    topology = cluster_topology(cluster, other)
    began = time.perf_counter()
    planner = EmbeddingShardingPlanner(
        topology=topology,
        constraints=bounds,
        # `cluster_topology` has taken off the reserve already, and what is not tables.
        storage_reservation=FixedPercentageStorageReservation(0.0),
        # TorchRec's default adds a grid search over all combinations: it takes minutes with a thousand ranks, and finds
        # no better plan.
        proposer=[GreedyProposer(), GreedyProposer(use_depth=False), UniformProposer()],
        stats=[],
        debug=False,
    )
    with _quiet():
        try:
            plan = planner.plan(model, [TableSharder()])
            chosen = planner._best_plan  # with the memory of each shard, which the plan itself does not say
        except PlannerError:
            plan, chosen = None, None
        seconds = time.perf_counter() - began
        # Without a plan, the options that the planner weighed still tell how much memory each table takes.
        options = chosen or _evenly(planner._enumerator.enumerate(model, [TableSharder()]))
    if plan is None:
        lack = _lack(options, settings, other)
        return DryRun(settings, sizes, seconds, search, {}, None, (), (), lack)
    tables = planned_tables(model, plan)
    step = StepModel(model, tables, work, cluster)
    return DryRun(
        settings,
        sizes,
        seconds,
        search,
        {where: step.estimate(where) for where in ("shard", "local")},
        plan,
        tables,
        _loads(options, tables, settings, other),
        None,
    )


def _bounds(model: CtrModel, work: Workload, search: Search, device_type: str) -> dict[str, ParameterConstraints]:
    """What the plan must keep to, with the number of ids that are looked up in each table.

    The planner thinks of a lookup of bags, where a shard answers for the bags of all ranks; here it answers for as
    many as are looked up in it, those of one rank on the mean.
    """
    bounds = constraints(model, device_type, work.ranks)
    searched = model.roles.attention
    for name, constraint in bounds.items():
        spec = model.tables.specs[name]
        if spec.inherent:
            local = search == "local" and model.searched in ("shard", "local") and spec.set in searched
            # Some models look up all behaviours with gradient; with local search the rows of attention are fetched for
            # all of them.
            everything = model.auxiliary is not None or model.attends_all or local
            ids = work.targets + (work.behaviors if everything else work.selected)
        else:
            ids = spec.rows / work.ranks
        # The planner multiplies by the number of ranks again.
        constraint.batch_sizes = [max(1, round(ids / work.ranks))]
    return bounds


def _evenly(options: list[ShardingOption]) -> list[ShardingOption]:
    """The option of each table whose largest shard is the smallest: how the tables would be spread if all fitted."""
    best: dict[str, ShardingOption] = {}
    for option in options:
        if option.name not in best or _largest(option) < _largest(best[option.name]):
            best[option.name] = option
    return list(best.values())


def _largest(option: ShardingOption) -> int:
    return max(int(shard.storage.hbm + shard.storage.ddr) for shard in option.shards)


def _lack(options: list[ShardingOption], settings: PlanSettings, other: int) -> Lack:
    ranks, on_cpu = settings.cluster.ranks, settings.cluster.device == "cpu"
    device, host = usable_memory(settings.cluster)
    sums = {
        memory: {
            option.name: sum(getattr(shard.storage, memory) for shard in option.shards) / ranks for option in options
        }
        for memory in ("hbm", "ddr")
    }
    # Evenly over all ranks: no plan can need less on its fullest one.
    needed = {memory: sum(parts.values()) for memory, parts in sums.items()}
    # Device memory is named if it lacks; host memory only where the device's would do.
    needed["ddr" if on_cpu else "hbm"] += other
    memory, usable = ("ddr", host) if on_cpu or needed["hbm"] <= device else ("hbm", device)
    table = max(sums[memory], key=lambda name: sums[memory][name])
    return Lack(
        "device" if memory == "hbm" else "host",
        round(needed[memory]),
        usable,
        table,
        round(sums[memory][table]),
    )


def _loads(
    options: list[ShardingOption], tables: tuple[PlannedTable, ...], settings: PlanSettings, other: int
) -> tuple[RankLoad, ...]:
    ranks, on_cpu = settings.cluster.ranks, settings.cluster.device == "cpu"
    device, host, lookups = [0 if on_cpu else other] * ranks, [other if on_cpu else 0] * ranks, [0.0] * ranks
    for option in options:
        for shard in option.shards:
            device[shard.rank] += shard.storage.hbm
            host[shard.rank] += shard.storage.ddr
    work = settings.stream.batch_size * (1 + sum(settings.model.retrieved.values()))
    for table in tables:
        # Ids are drawn evenly over rows: their order is shuffled.
        looked_up = float(work if table.inherent else table.rows)
        for rank, rows in zip(table.ranks, table.shard_rows, strict=True):
            lookups[rank] += looked_up * rows / table.rows
    total = sum(lookups)
    return tuple(
        RankLoad(of_device, of_host, looked_up / total)
        for of_device, of_host, looked_up in zip(device, host, lookups, strict=True)
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the planner's log lines and warnings about itself, which tell the users of a dry run nothing."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


_PER_MS = 1e6
"""Bytes/ms, the planner's unit of bandwidth, in a GB/s."""


def usable_memory(cluster: ClusterSettings) -> tuple[int, int]:
    """Bytes of device and of host memory that a rank may plan with."""
    share = 1 - cluster.reserved
    return int(cluster.device_memory * share), int(cluster.host_memory / cluster.devices_per_node * share)


def cluster_topology(cluster: ClusterSettings, taken: int = 0) -> Topology:
    """The cluster as TorchRec's planner sees it.

    Args:
        cluster: the machines.
        taken: bytes of a rank's memory (device memory, or host memory on a CPU) that are not for tables.
    """
    device_bytes, host_bytes = usable_memory(cluster)
    on_cpu = cluster.device == "cpu"
    return TopologyFactory.create_topology(
        TrainerConfig(world_size=cluster.ranks, local_world_size=cluster.devices_per_node),
        HardwareConfig(
            # The planner's device memory is "hbm" and the host's "ddr". On a CPU all tables are in the latter.
            hbm_cap_bytes=0 if on_cpu else max(0, device_bytes - taken),
            ddr_cap_bytes=max(1, host_bytes - taken * on_cpu),
            intra_host_bw=cluster.within_node.bandwidth * _PER_MS,
            inter_host_bw=min(cluster.between_nodes.bandwidth, cluster.within_node.bandwidth) * _PER_MS,
            hbm_mem_bw=cluster.memory_bandwidth * _PER_MS,
            ddr_mem_bw=cluster.memory_bandwidth * _PER_MS,
            hbm_to_ddr_mem_bw=cluster.host_link * _PER_MS,
        ),
        KernelConfig(compute_device=cluster.device, use_hardware_based_bandwidth=True),
    )
