"""Whether a model's tables fit into the memory of the ranks, and where TorchRec's planner puts them.

`dare plan` asks for machines of a settings file, `dare train` for those that it runs on; what fits in one fits in the
other. No process group is needed, and no memory for tables: the model is on the meta device.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.proposers import GreedyProposer, UniformProposer
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    Perf,
    PlannerError,
    SharderDataMap,
    ShardingOption,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ShardingPlan, ShardingType

from embeddings.model import CtrModel
from embeddings.tables.sharder import KERNELS, TableSharder
from embeddings.tables.specs import CONTEXT
from embeddings.workload import Search, Workload, distinct
from schemas.errors import UserError
from schemas.model import TableOptimizer

STATE_BYTES: dict[TableOptimizer, tuple[int, int]] = {
    "sgd": (0, 0),
    "rowwise_adagrad": (4, 0),
    "adagrad": (0, 4),
    "adam": (0, 8),
    "rowwise_adam": (4, 4),
}
"""Bytes of optimizer state, for a row and for each of its values; FBGEMM keeps it in fp32 whatever the rows are."""

RESERVED = 0.15
"""Share of a memory that a plan leaves free: the allocator, NCCL, the batches to come."""

FLOAT = 4
"""Bytes of a float."""

DENSE_COPIES = 5
"""Copies of the dense parameters in memory: weights, gradients, DDP's buckets, Adam's two averages."""

INPUT_COPIES = 12
"""Copies of what the prediction sees, its hidden layers and gradients included."""

ROW_COPIES = 4
"""Copies of the rows of retrieved behaviours that attention keeps for its backward pass."""

LOCAL_COPIES = 4
"""Copies of the different rows of all behaviours in a search on the sample's rank, on their way there."""

BEHAVIOR_BYTES, PAIR_BYTES, BEST_BYTES = 32, 8, 12
"""Bytes of a search: of a behaviour's columns and indices on its shard; of a (target, behaviour) pair where scores are
written; of the score and the index of one that is kept."""


@dataclass(frozen=True)
class Machines:
    """Ranks and the memory that each of them may plan with, in bytes."""

    device: Literal["cpu", "cuda"]
    ranks: int
    ranks_per_node: int
    device_bytes: int
    """0 on ``cpu``."""
    host_bytes: int
    """The rank's part of its host's memory."""


def usable(total: int, free: int | None = None) -> int:
    """Bytes of a memory that a plan may use.

    Args:
        total: bytes in all.
        free: bytes that nobody uses now; None: all of them.
    """
    share = int(total * (1 - RESERVED))
    return share if free is None else min(share, free)


@dataclass(frozen=True)
class Placement:
    """A plan, and the bytes that each rank needs by it, those beside the tables included."""

    plan: ShardingPlan
    device_bytes: tuple[int, ...]
    host_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Lack:
    """Which memory is too small for a model that does not fit."""

    memory: str
    """``device`` or ``host``."""
    needed: int
    """Bytes that a rank needs at least, wherever the planner puts the tables."""
    usable: int
    """Bytes that a rank may plan with."""
    beside: int
    """Bytes of those needed that are not for tables: the batch, the search, the dense parameters."""
    table: str
    """The table that takes most of it."""
    table_bytes: int
    """Bytes that this table takes on a rank."""

    def __str__(self) -> str:
        return (
            f"a rank lacks {size_text(self.needed - self.usable)} of {self.memory} memory: it needs "
            f"{size_text(self.needed)} of {size_text(self.usable)} usable, {size_text(self.beside)} of it beside the "
            f"tables, most for table {self.table} ({size_text(self.table_bytes)} a rank)"
        )


class TablesDoNotFitError(UserError):
    """The tables do not fit; the text says which memory lacks how much, for which table, and what would help."""

    def __init__(self, lack: Lack, advice: str) -> None:
        super().__init__(f"the model does not fit: {lack}; {advice}")
        self.lack = lack


class _TableStorage(EmbeddingStorageEstimator):
    """TorchRec's estimate of what a shard takes, with the optimizers' state as FBGEMM keeps it.

    TorchRec counts state in the rows' own precision and takes a part of it for cached where rows are; both are too
    little. It counts no state at all while no optimizer is fused, as in a model that is planned here.

    The bytes stand for the time of a shard too, by which the planner spreads tables that lie whole on a rank.
    TorchRec's estimate of times chooses between kinds of sharding, of which `constraints` leave one for each table, and
    takes most of the planner's time with a thousand ranks.
    """

    def __init__(self, topology: Topology, bounds: dict[str, ParameterConstraints], model: CtrModel) -> None:
        super().__init__(topology=topology, constraints=bounds)
        self._specs, self._on_cpu = model.tables.specs, topology.compute_device == "cpu"

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap) -> None:
        """Fill in the bytes of every shard of every option, and its time."""
        super().estimate(sharding_options, sharder_data_map)
        for option in sharding_options:
            settings = self._specs[option.name].settings
            of_row, of_value = STATE_BYTES[settings.optimizer]
            for shard in option.shards:
                rows, dim = shard.size
                row_state, value_state = rows * of_row, rows * dim * of_value
                # `construct_split_state` of FBGEMM: state of whole rows is on the device even where the rows are not.
                on_host = self._on_cpu, self._on_cpu or settings.memory == "host"
                for state, host in zip((row_state, value_state), on_host, strict=True):
                    if host:
                        shard.storage.ddr += state
                    else:
                        shard.storage.hbm += state
                held = float(shard.storage.hbm + shard.storage.ddr)
                shard.perf = Perf(fwd_compute=held, fwd_comms=0, bwd_compute=0, bwd_comms=0)


def plan_tables(model: CtrModel, machines: Machines, work: Workload) -> Placement:
    """Plan a model's tables; the plan depends on nothing but the arguments.

    Args:
        model: not sharded yet, its optimizers not fused.
        machines: the ranks and their memory.
        work: of a rank in a step.

    Returns:
        The plan, and what each rank holds by it.

    Raises:
        TablesDoNotFitError: they do not fit.
    """
    beside, bounds = beside_tables(model, work), _bounds(model, machines, work)
    with _quiet():
        planner = _planner(model, topology_of(machines, beside), bounds)
        try:
            plan = planner.plan(model, [TableSharder()])
        except PlannerError:
            # Without a plan, the options that the planner weighed still tell how much memory each table takes.
            lack = _lack(planner._enumerator.enumerate(model, [TableSharder()]), machines, beside)
            if lack.needed <= lack.usable:
                raise  # for another reason than memory, of which it says more than we could
            raise TablesDoNotFitError(lack, _advice(model, machines, lack)) from None
    chosen = planner._best_plan  # with the memory of each shard, which the plan itself does not say
    assert chosen is not None
    on_cpu = machines.device == "cpu"
    device, host = [0 if on_cpu else beside] * machines.ranks, [beside if on_cpu else 0] * machines.ranks
    for option in chosen:
        for shard in option.shards:
            device[shard.rank] += shard.storage.hbm
            host[shard.rank] += shard.storage.ddr
    return Placement(plan, tuple(device), tuple(host))


def _planner(model: CtrModel, topology: Topology, bounds: dict[str, ParameterConstraints]) -> EmbeddingShardingPlanner:
    return EmbeddingShardingPlanner(
        topology=topology,
        # ``bounds`` have the batch sizes of every table: the one of the enumerator is not used.
        enumerator=EmbeddingEnumerator(topology, 1, bounds, _TableStorage(topology, bounds, model)),
        constraints=bounds,
        # `usable` has taken off the reserve already, and `topology_of` what is not tables.
        storage_reservation=FixedPercentageStorageReservation(0.0),
        # TorchRec's default adds a grid search over all combinations: it takes minutes with a thousand ranks, and finds
        # no better plan.
        proposer=[GreedyProposer(), GreedyProposer(use_depth=False), UniformProposer()],
        stats=[],
        debug=False,
    )


def constraints(model: CtrModel, device_type: str, ranks: int) -> dict[str, ParameterConstraints]:
    """What TorchRec's planner must keep to: all tables row-wise, in equal parts on all ranks, but for those of context.

    Shards search and pool the item and category tables; a row that is needed elsewhere travels once; and the cross
    tables, which every rank needs whole, are gathered in equal parts from all (`embeddings.tables`). With a table-wise
    table one rank would send a vector for every bag of every other rank. Tables of context are looked up by TorchRec's
    own lookup, which knows both ways: the planner chooses.

    Args:
        model: not sharded yet.
        device_type: ``cpu`` or ``cuda``, where the tables will be.
        ranks: number of ranks.

    Returns:
        The constraints of each table, by its name.
    """
    # The planner has little left to choose: it fills in sizes and devices, and checks that the tables fit into memory.
    by_table, on_shard = {}, used_on_shards(model)
    for spec, weight in model.tables.weights():
        # Where a rank would have no rows, FBGEMM's backward pass on a CPU takes the next table for this one.
        small = device_type == "cpu" and spec.name not in on_shard and _leaves_out_a_rank(len(weight), ranks)
        kinds = [ShardingType.TABLE_WISE.value if small else ShardingType.ROW_WISE.value]
        if spec.kind == "context" and not small:
            kinds.append(ShardingType.TABLE_WISE.value)
        by_table[spec.name] = ParameterConstraints(
            sharding_types=kinds, compute_kernels=[KERNELS[spec.settings.memory]], pooling_factors=[1.0]
        )
    return by_table


def _leaves_out_a_rank(rows: int, ranks: int) -> bool:
    """Whether a table in equal parts (the last ones shorter) has no rows left for the last rank."""
    # Blocks of ceil(rows / ranks) rows may be used up before the last rank: 4 rows on 3 ranks are 2 + 2 + 0.
    return ranks > 1 and -(-rows // ranks) * (ranks - 1) >= rows


def used_on_shards(model: CtrModel) -> set[str]:
    """Names of the tables that shards search or pool; none where the rows travel to the samples' ranks."""
    if search_place(model) == "local":
        return set()
    return {spec.name for spec in model.tables.specs.values() if spec.inherent}


def search_place(model: CtrModel) -> Search:
    """Where the model searches once its tables are sharded."""
    return model.settings.search if model.searched == "shard" else "local"


def looks_up_all(model: CtrModel) -> bool:
    """Whether all behaviours are looked up with gradient, not only those that the search has selected."""
    return model.auxiliary is not None or model.attends_all


def dense_parameters(model: CtrModel) -> int:
    """Number of values of all parameters that are not tables; before sharding only."""
    return sum(weight.numel() for name, weight in model.named_parameters() if ".embedding_bags." not in name)


def beside_tables(model: CtrModel, work: Workload) -> int:
    """Bytes of a rank's memory that are not for tables and their optimizers: rough, and small beside tables."""
    dense = dense_parameters(model) * FLOAT * DENSE_COPIES
    inputs = model.predicted_from * work.targets * FLOAT * INPUT_COPIES
    # Rows as attention keeps them for its backward pass.
    kept = (work.pairs if looks_up_all(model) else work.targets * work.retrieved) * sum(
        sum((model.tables.inherent_dims(name) | model.tables.cross_dims(name)).values())
        for name in model.tables.inherent
    )
    return round(dense + inputs + kept * FLOAT * ROW_COPIES + _search_bytes(model, work))


def _search_bytes(model: CtrModel, work: Workload) -> float:
    """Bytes of a search's rows and scores at their peak."""
    if model.searched in ("ids", "none"):
        return work.pairs * PAIR_BYTES
    if search_place(model) == "local":
        specs = [spec for spec in model.tables.specs.values() if spec.set == model.roles.history_attention]
        inherent = [spec for spec in specs if spec.inherent and spec.feature in model.tables.sides.scored]
        # Equal rows travel once, and on one rank none does: they are read where they are. A score that is no dot
        # product of rows takes them side by side.
        fetched = sum(distinct(work.behaviors, spec.rows) * spec.dim for spec in inherent if not spec.gathered)
        rows = fetched * LOCAL_COPIES if work.ranks > 1 else 0
        rows += work.behaviors * sum(spec.dim for spec in inherent) if model.searched == "local" else 0
        return rows * FLOAT + work.behaviors * BEHAVIOR_BYTES + work.pairs * PAIR_BYTES
    # On its shard nothing of the size of pairs is written: each keeps its best for each target of all ranks.
    targets = work.targets * work.ranks
    answers = sum(min(part.pairs / work.targets / work.ranks, part.retrieved) for part in work.sequences)
    query = sum(model.tables.inherent_dims(model.roles.target_attention, scored=True).values()) * FLOAT
    return work.behaviors * BEHAVIOR_BYTES + targets * (answers * BEST_BYTES + query)


def _bounds(model: CtrModel, machines: Machines, work: Workload) -> dict[str, ParameterConstraints]:
    """What the plan must keep to, with the number of ids that are looked up in each table.

    The planner thinks of a lookup of bags, where a shard answers for the bags of all ranks; here it answers for as
    many as are looked up in it, those of one rank on the mean.
    """
    bounds = constraints(model, machines.device, machines.ranks)
    for name, constraint in bounds.items():
        spec = model.tables.specs[name]
        if spec.kind == "context":
            ids = float(work.targets * machines.ranks)
        elif not spec.gathered:
            # With local search the rows of attention are fetched for all behaviours.
            fetched = search_place(model) == "local" and model.searched in ("shard", "local")
            everything = looks_up_all(model) or (fetched and spec.set in model.roles.attention)
            ids = work.targets + (work.behaviors if everything else work.selected)
        else:
            ids = spec.rows / machines.ranks
        # The planner multiplies by the number of ranks again.
        constraint.batch_sizes = [max(1, round(ids / machines.ranks))]
    return bounds


def topology_of(machines: Machines, taken: int = 0) -> Topology:
    """The machines as TorchRec's planner sees them.

    Args:
        machines: the ranks and their memory.
        taken: bytes of a rank's memory (device memory, or host memory on a CPU) that are not for tables.
    """
    on_cpu = machines.device == "cpu"
    return TopologyFactory.create_topology(
        TrainerConfig(world_size=machines.ranks, local_world_size=machines.ranks_per_node),
        # The planner's device memory is "hbm" and the host's "ddr"; on a CPU all tables are in the latter.
        HardwareConfig(
            hbm_cap_bytes=0 if on_cpu else max(0, machines.device_bytes - taken),
            ddr_cap_bytes=max(1, machines.host_bytes - taken * on_cpu),
        ),
        KernelConfig(compute_device=machines.device),
    )


def _lack(options: list[ShardingOption], machines: Machines, beside: int) -> Lack:
    on_cpu = machines.device == "cpu"
    sums = {memory: {option.name: _least(option, memory, machines.ranks) for option in options} for memory in _MEMORIES}
    needed = {memory: sum(parts.values()) for memory, parts in sums.items()}
    needed["ddr" if on_cpu else "hbm"] += beside
    # Device memory is named if it lacks; host memory only where the device's would do.
    memory = "ddr" if on_cpu or needed["hbm"] <= machines.device_bytes else "hbm"
    table = max(sums[memory], key=lambda name: sums[memory][name])
    return Lack(
        memory=_MEMORIES[memory],
        needed=round(needed[memory]),
        usable=machines.host_bytes if memory == "ddr" else machines.device_bytes,
        beside=beside if on_cpu or memory == "hbm" else 0,
        table=table,
        table_bytes=round(sums[memory][table]),
    )


_MEMORIES = {"hbm": "device", "ddr": "host"}
"""TorchRec's names of the two memories, and ours."""


def _least(option: ShardingOption, memory: str, ranks: int) -> float:
    """Bytes that the fullest rank needs at least for a table."""
    sizes = [getattr(shard.storage, memory) for shard in option.shards]
    # A row-wise table's first rank has a full part; one that lies whole on some rank is taken to be spread evenly.
    return float(max(sizes) if option.sharding_type == ShardingType.ROW_WISE.value else sum(sizes) / ranks)


def _advice(model: CtrModel, machines: Machines, lack: Lack) -> str:
    """What may help, as far as it depends on the table that takes most; `dare plan` tries what is enough."""
    spec, roles = model.tables.specs[lack.table], model.roles
    parts = {"attention": roles.attention, "representation": roles.representation, CONTEXT: {CONTEXT}}
    sections = [f"model.{role}" for role, sets in parts.items() if spec.set in sets]
    changes = ["more ranks", " and ".join(f"a smaller {section}.dim" for section in sections)]
    if lack.beside > lack.table_bytes:
        changes.append("a smaller stream.batch_size")
    if machines.device == "cuda" and lack.memory == "device" and spec.name not in searched_in_place(model):
        changes.append(" and ".join(f"{section}.memory=host" for section in sections))
    return f"try {', '.join(changes)}; `dare plan` tells which change is enough"


def searched_in_place(model: CtrModel) -> set[str]:
    """Names of the tables whose rows a search on the shards reads where they are, not through a lookup."""
    if search_place(model) == "local":
        return set()
    searched = [spec for spec in model.tables.specs.values() if spec.inherent and spec.set in model.roles.attention]
    return {spec.name for spec in searched if spec.feature in model.tables.sides.scored}


def size_unit(count: float) -> tuple[int, str]:
    """The largest unit that so many bytes reach, in bytes, and its name."""
    power = next((power for power in range(4) if count < 1024 ** (power + 1)), 4)
    return 1024**power, ("B", "KiB", "MiB", "GiB", "TiB")[power]


def size_text(count: float) -> str:
    """Bytes for people."""
    size, unit = size_unit(count)
    value = count / size
    return f"{value:,.0f} {unit}" if size == 1 or (value >= 100 and unit != "TiB") else f"{value:,.1f} {unit}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the planner's log lines and warnings about itself, which tell nothing that a user can change."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
