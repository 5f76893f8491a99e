"""TorchRec's planner on tables that do not exist, and what a step of the planned model costs.

Nothing is measured and no GPU is needed: the model is built on the meta device, and the cluster is a settings file.
"""

import time
from dataclasses import dataclass

import torch
from torchrec.distributed.types import ShardingPlan

from embeddings.model import SearchPlace
from embeddings.models import MODELS, build_model
from embeddings.planning import (
    Lack,
    Machines,
    Placement,
    TablesDoNotFitError,
    plan_tables,
    search_place,
    usable,
)
from embeddings.sharding import check_tables
from embeddings.sizes import DataSizes
from embeddings.workload import Search, Workload
from pipeline.planning.cost_model import StepEstimate, StepModel
from pipeline.planning.planned_tables import PlannedTable, planned_tables
from schemas.cluster import ClusterSettings
from schemas.plan import PlanSettings


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
    cluster, load = settings.cluster, settings.workload
    model = build_model(settings.model, sizes, torch.device("meta"))
    # As in training: what the device cannot train is refused before its memory is looked at.
    check_tables(model, cluster.device)
    work = Workload.of(
        settings.model.attended,
        sizes,
        cluster.ranks,
        settings.stream.batch_size,
        load.targets_per_user,
        load.filled,
    )
    search, began = search_place(model), time.perf_counter()
    try:
        placement = plan_tables(model, machines_of(cluster), work)
    except TablesDoNotFitError as error:
        seconds = time.perf_counter() - began
        return DryRun(settings, sizes, seconds, search, {}, None, (), (), error.lack)
    seconds = time.perf_counter() - began
    tables = planned_tables(model, placement.plan)
    step = StepModel(model, tables, work, cluster)
    return DryRun(
        settings,
        sizes,
        seconds,
        search,
        {where: step.estimate(where) for where in ("shard", "local")},
        placement.plan,
        tables,
        _loads(placement, tables, settings),
        None,
    )


def machines_of(cluster: ClusterSettings) -> Machines:
    """The cluster as training would find it."""
    return Machines(
        device=cluster.device,
        ranks=cluster.ranks,
        ranks_per_node=cluster.devices_per_node,
        device_bytes=usable(cluster.device_memory),
        host_bytes=usable(cluster.host_memory // cluster.devices_per_node),
    )


def _loads(placement: Placement, tables: tuple[PlannedTable, ...], settings: PlanSettings) -> tuple[RankLoad, ...]:
    lookups = [0.0] * settings.cluster.ranks
    work = settings.stream.batch_size * (1 + sum(settings.model.attended.values()))
    for table in tables:
        # Ids are drawn evenly over rows: their order is shuffled.
        looked_up = float({"inherent": work, "cross": table.rows, "context": settings.stream.batch_size}[table.kind])
        for rank, rows in zip(table.ranks, table.shard_rows, strict=True):
            lookups[rank] += looked_up * rows / table.rows
    total = sum(lookups)
    return tuple(
        RankLoad(of_device, of_host, looked_up / total)
        for of_device, of_host, looked_up in zip(placement.device_bytes, placement.host_bytes, lookups, strict=True)
    )
