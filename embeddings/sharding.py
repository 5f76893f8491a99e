"""A model's tables over many ranks: TorchRec's planner makes the plan, `DistributedModelParallel` runs it.

Training, evaluation and scoring all build their model here.
"""

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch.optim import SGD, Adagrad, Adam, Optimizer
from torchrec import EmbeddingBagCollection
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding_sharding import USE_ONE_TBE_PER_TABLE
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.types import KernelConfig, TopologyFactory, TrainerConfig
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingPlan, ShardingType
from torchrec.optim import PartialRowWiseAdam, RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from embeddings.layers.mlp import compute_in
from embeddings.model import CtrModel
from embeddings.models import build_model
from embeddings.sizes import DataSizes
from schemas.errors import UserError
from schemas.manifest import Manifest
from schemas.model import INHERENT, Memory, TableOptimizer
from schemas.train import TrainSettings

OPTIMIZERS: dict[TableOptimizer, type[Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": Adagrad,
    "sgd": SGD,
    "adam": Adam,
    "rowwise_adam": PartialRowWiseAdam,
}
CPU_OPTIMIZERS: tuple[TableOptimizer, ...] = ("rowwise_adagrad", "adagrad", "sgd")
"""What FBGEMM fuses into the backward pass on a CPU."""

KERNELS: dict[Memory, str] = {
    "device": EmbeddingComputeKernel.FUSED.value,
    "host": EmbeddingComputeKernel.FUSED_UVM_CACHING.value,
}
"""By where a table's rows are."""


class TableSharder(EmbeddingBagCollectionSharder):
    """Row-wise or table-wise on every device, gradients and optimizer fused; an id outside of its table is an error.

    TorchRec's own sharder offers no row-wise sharding on a CPU. Data-parallel tables are left out: FBGEMM's dense
    kernels pool what they should not on a CPU, and their gradients are dense.
    """

    def __init__(self) -> None:
        # FBGEMM's default logs such an id and reads row 0 in its place: training would go on, on wrong rows.
        super().__init__(fused_params={"bounds_check_mode": BoundsCheckMode.FATAL})

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingBagCollection:
        """Shard a collection; the tables of one that is looked up by id have a kernel each.

        A kernel looks up as many bags in each of its tables, and an item table is asked for other ids than a small one.
        """
        apart = any(spec.feature_names[0] in INHERENT for spec in module.embedding_bag_configs())
        sharder = EmbeddingBagCollectionSharder(fused_params={**self.fused_params, USE_ONE_TBE_PER_TABLE: apart})
        return sharder.shard(module, params, env, device, module_fqn)

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """The sharding types that the planner may choose from."""
        return [ShardingType.ROW_WISE.value, ShardingType.TABLE_WISE.value]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """The compute kernels that tables may have; which one a table gets follows from its settings."""
        # Fused kernels alone: each takes its optimizer's step in the backward pass, so no gradient of a whole table
        # exists.
        return [KERNELS["device"]] if compute_device_type == "cpu" else list(KERNELS.values())


def topology(device: torch.device) -> Topology:
    """The default process group as a topology of TorchRec's planner."""
    ranks = dist.get_world_size()
    # Ranks on CPUs count as one node, wherever they are.
    local = torch.cuda.device_count() if device.type == "cuda" else ranks
    return TopologyFactory.create_topology(
        TrainerConfig(world_size=ranks, local_world_size=min(ranks, local)),
        kernel_config=KernelConfig(compute_device=device.type),
    )


def constraints(model: CtrModel, device_type: str, ranks: int) -> dict[str, ParameterConstraints]:
    """What TorchRec's planner must keep to: every table row-wise, in equal parts on all ranks.

    Shards search and pool the item and category tables; a row that is needed elsewhere travels once; and the cross
    tables, which every rank needs whole, are gathered in equal parts from all (`embeddings.tables`). With a table-wise
    table one rank would send a vector for every bag of every other rank.

    Args:
        model: not sharded yet.
        device_type: ``cpu`` or ``cuda``, where the tables will be.
        ranks: number of ranks.

    Returns:
        The constraints of each table, by its name.
    """
    # The planner has little left to choose: it fills in sizes and devices, and checks that the tables fit into memory.
    by_table, on_shard = {}, _searched_on_shards(model)
    for spec, weight in model.tables.weights():
        # Where a rank would have no rows, FBGEMM's backward pass on a CPU takes the next table for this one.
        small = device_type == "cpu" and spec.name not in on_shard and _leaves_out_a_rank(len(weight), ranks)
        kind = ShardingType.TABLE_WISE.value if small else ShardingType.ROW_WISE.value
        by_table[spec.name] = ParameterConstraints(
            sharding_types=[kind], compute_kernels=[KERNELS[spec.settings.memory]], pooling_factors=[1.0]
        )
    return by_table


def _leaves_out_a_rank(rows: int, ranks: int) -> bool:
    """Whether a table in equal parts (the last ones shorter) has no rows left for the last rank."""
    # Blocks of ceil(rows / ranks) rows may be used up before the last rank: 4 rows on 3 ranks are 2 + 2 + 0.
    return ranks > 1 and -(-rows // ranks) * (ranks - 1) >= rows


def _searched_on_shards(model: CtrModel) -> set[str]:
    """Names of the tables that shards search or pool; none where the rows travel to the samples' ranks."""
    if model.settings.search == "local" or model.searched != "shard":
        return set()
    return {spec.name for spec in model.tables.specs.values() if spec.inherent}


def make_plan(model: CtrModel, device: torch.device, bags: int) -> ShardingPlan:
    """The planner's plan for ``model``, the same on all ranks of the default process group.

    Args:
        model: not sharded yet.
        device: where this rank's tables will be.
        bags: number of rows that a rank looks up in a step, for the planner's estimates.
    """
    by_table = constraints(model, device.type, dist.get_world_size())
    # The first rank plans and sends the plan to the others, so that none depends on what it sees of its own machine.
    planner = EmbeddingShardingPlanner(topology=topology(device), batch_size=bags, constraints=by_table)
    group = dist.group.WORLD
    assert group is not None, "no process group; see embeddings.distributed.process_group"
    return planner.collective_plan(model, [TableSharder()], group)


def check_tables(model: CtrModel, device: str) -> None:
    """Refuse tables whose settings a kind of device, ``cpu`` or ``cuda``, cannot train.

    Raises:
        UserError: an optimizer, a precision or a place in memory that it does not have; names the table.
    """
    if device != "cpu":
        return
    for name, spec in model.tables.specs.items():
        table = spec.settings
        if table.optimizer not in CPU_OPTIMIZERS:
            raise UserError(
                f"table {name}: optimizer {table.optimizer} needs CUDA; on a CPU: {', '.join(CPU_OPTIMIZERS)}"
            )
        if table.precision != "fp32":
            raise UserError(f"table {name}: precision {table.precision} needs CUDA; on a CPU: fp32")
        if table.memory != "device":
            raise UserError(f"table {name}: memory {table.memory} needs CUDA; on a CPU: device")


def fuse_optimizers(model: CtrModel, device: torch.device) -> None:
    """Give each table the optimizer of its settings, to run in the backward pass.

    Raises:
        UserError: as `check_tables`.
    """
    check_tables(model, device.type)
    for spec, weight in model.tables.weights():
        table = spec.settings
        settings = {"lr": table.learning_rate}
        # `torch.optim.SGD` has no eps, and would refuse it.
        if table.optimizer != "sgd":
            settings["eps"] = table.epsilon
        apply_optimizer_in_backward(OPTIMIZERS[table.optimizer], [weight], settings)


def shard(model: CtrModel, device: torch.device, plan: ShardingPlan) -> DistributedModelParallel:
    """Shard the tables by ``plan`` over the default process group and replicate the rest; gradients are averaged.

    One rank goes the same way as many: an unsharded `EmbeddingBagCollection` would have gradients as large as itself.

    Args:
        model: with its tables on the meta device, and its optimizers not fused yet.
        device: where the rank computes.
        plan: see `make_plan`.

    Returns:
        The sharded model, its tables' optimizers fused. Its weights are arbitrary until `initialize` or a checkpoint.

    Raises:
        UserError: a plan for other tables or another number of ranks; settings that the device does not fit.
    """
    # The optimizers come first: TorchRec looks for them on the parameters when it shards these, and fuses what it
    # finds.
    _check_plan(model, device, plan)
    fuse_optimizers(model, device)
    group = dist.group.WORLD
    assert group is not None, "no process group; see embeddings.distributed.process_group"
    return DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(group),
        device=device,
        plan=plan,
        sharders=[TableSharder()],
        # Every parameter has a gradient in every step, on an empty batch too: nothing to search for or to record.
        data_parallel_wrapper=DefaultDataParallelWrapper(static_graph=False),
    )


def _check_plan(model: CtrModel, device: torch.device, plan: ShardingPlan) -> None:
    # A plan may come from a file, of another model, machine or number of ranks. TorchRec would follow it, and fail
    # later with less to say.
    planned = {name: sharding for tables in plan.plan.values() for name, sharding in tables.items()}
    rows = {name: (spec.rows, spec.dim) for name, spec in model.tables.specs.items()}
    if planned.keys() != rows.keys():
        differing = ", ".join(sorted(planned.keys() ^ rows.keys()))
        raise UserError(f"the sharding plan is not of this model: {differing} is only in one of them")
    ranks, on_shard = dist.get_world_size(), _searched_on_shards(model)
    for name, (count, dim) in rows.items():
        sharding = planned[name]
        if sharding.ranks and max(sharding.ranks) >= ranks:
            raise UserError(f"the sharding plan puts table {name} on rank {max(sharding.ranks)} of {ranks}")
        if sharding.sharding_type == ShardingType.ROW_WISE.value and sharding.ranks != list(range(ranks)):
            raise UserError(
                f"the sharding plan spreads table {name} over {len(sharding.ranks or [])} ranks, these are {ranks}"
            )
        shards = sharding.sharding_spec.shards if sharding.sharding_spec else []
        if any(part.placement.device().type != device.type for part in shards):
            raise UserError(f"the sharding plan is not for {device.type}: table {name} is elsewhere in it")
        # Counted in values, not in rows: a plan may cut a table by columns too.
        held = sum(part.shard_sizes[0] * part.shard_sizes[1] for part in shards)
        if device.type == "cpu" and any(part.shard_sizes[0] == 0 for part in shards):
            raise UserError(
                f"table {name}: {count} rows are too few to be row-wise on {ranks} ranks of a CPU, "
                "one would have none: use fewer ranks, or set model.search=local"
            )
        if name in on_shard and sharding.sharding_type != ShardingType.ROW_WISE.value:
            raise UserError(
                f"the sharding plan has table {name} {sharding.sharding_type}; model.search=shard needs row_wise: "
                "make the plan anew, or set model.search=local"
            )
        if held != count * dim:
            raise UserError(f"the sharding plan holds {held} values of table {name}, the model has {count} x {dim}")


def sharded_model(
    settings: TrainSettings, manifest: Manifest, device: torch.device, plan: ShardingPlan | None = None
) -> DistributedModelParallel:
    """The model of a run, sharded over the default process group; its weights are arbitrary until drawn or loaded.

    Args:
        settings: the settings of the run.
        manifest: the data set, whose sizes decide those of the tables.
        device: where this rank computes.
        plan: a plan to follow, for the same number of ranks; None: one is made.

    Raises:
        UserError: settings that do not fit the data, the device or each other; a plan that does not fit them.
    """
    model = build_model(settings.model, DataSizes.of(manifest, settings.stream), torch.device("meta"))
    if device.type == "cuda":
        compute_in(model, settings.compute)
    if plan is None:
        # A step looks up each target and its K behaviours of each sequence.
        bags = settings.stream.batch_size * (1 + sum(settings.model.retrieved.values()))
        plan = make_plan(model, device, bags)
    return shard(model, device, plan)
