"""A model's tables over many ranks: TorchRec's planner makes the plan, `DistributedModelParallel` runs it.

Training, evaluation and scoring all build their model here.
"""

import ctypes
import os
from contextlib import suppress
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.optim import SGD, Adagrad, Adam, Optimizer
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper
from torchrec.distributed.types import ShardingEnv, ShardingPlan, ShardingType
from torchrec.optim import PartialRowWiseAdam, RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from embeddings.layers.mlp import compute_in
from embeddings.machine import check_dense, container_limit
from embeddings.model import CtrModel
from embeddings.models import build_model
from embeddings.planning import Machines, plan_tables, searched_in_place, usable, used_on_shards
from embeddings.sizes import DataSizes
from embeddings.tables.sharder import TableSharder
from embeddings.workload import Workload, mean_load
from schemas.errors import UserError
from schemas.manifest import Manifest
from schemas.model import TableOptimizer
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


def machines_here(device: torch.device) -> Machines:
    """The ranks of the default process group, and the memory of the poorest of them; every rank must call it.

    Args:
        device: where this rank computes.
    """
    ranks = dist.get_world_size()
    # The launcher's number of ranks on a node; a group without a launcher is on this one.
    local = min(ranks, int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
    host = psutil.virtual_memory()
    host_bytes = usable(min(host.total, container_limit()) // local, host.available // local)
    device_bytes = 0
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # What the allocator keeps for this process is free for new tables.
        device_bytes = usable(total, free + torch.cuda.memory_reserved(device))
    found: list[Any] = [None] * ranks
    dist.all_gather_object(found, (device_bytes, host_bytes))
    return Machines(
        device="cuda" if device.type == "cuda" else "cpu",
        ranks=ranks,
        ranks_per_node=local,
        device_bytes=min(of_device for of_device, _ in found),
        host_bytes=min(of_host for _, of_host in found),
    )


def make_plan(
    model: CtrModel, device: torch.device, batch_size: int, targets_per_user: float = 1.0, filled: float = 1.0
) -> ShardingPlan:
    """The plan for ``model``, the same on all ranks of the default process group; every rank must call it.

    Args:
        model: not sharded yet, its optimizers not fused.
        device: where this rank's tables will be.
        batch_size: targets of a rank in a step.
        targets_per_user: targets of a batch that share a user's history.
        filled: the share of N that a history fills.

    Raises:
        UserError: the tables do not fit into the memory that the ranks have.
    """
    machines = machines_here(device)
    work = Workload.of(model.settings.attended, model.sizes, machines.ranks, batch_size, targets_per_user, filled)
    message: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            message = [plan_tables(model, machines, work).plan]
        except UserError as error:
            message = [str(error)]
    # The first rank plans, for with many ranks it takes a while, and all must follow the same plan, or fail together.
    dist.broadcast_object_list(message)
    (plan,) = message
    if isinstance(plan, str):
        raise UserError(plan)
    assert isinstance(plan, ShardingPlan)
    return plan


def check_tables(model: CtrModel, device: str) -> None:
    """Refuse tables whose settings a kind of device, ``cpu`` or ``cuda``, cannot train.

    Raises:
        UserError: an optimizer, a precision or a place in memory that it does not have, or that the model cannot
            search in; names the table.
    """
    searched = searched_in_place(model)
    for name, spec in model.tables.specs.items():
        # Each read would first write back all that the device has cached of the table, and then read the host's copy.
        if name in searched and spec.settings.memory == "host":
            raise UserError(
                f"table {name}: memory host cannot be searched with model.search=shard: set memory: device for "
                "model.attention's tables of items and their features, or model.search=local"
            )
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
    sharded = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(group),
        device=device,
        plan=plan,
        sharders=[TableSharder()],
        # Every parameter has a gradient in every step, on an empty batch too: nothing to search for or to record.
        data_parallel_wrapper=DefaultDataParallelWrapper(static_graph=False),
    )
    if device.type == "cpu":
        _use_huge_pages(sharded)
    return sharded


_MADV_DONTNEED, _MADV_HUGEPAGE = 4, 14
"""Numbers of Linux's <sys/mman.h>."""
_PAGE, _HUGE_PAGE = 4 << 10, 2 << 20


def _use_huge_pages(sharded: DistributedModelParallel) -> None:
    """Put large tables and their optimizers' state into pages of 2 MiB; before they are filled, for they become zeros.

    Rows are read at random, and with pages of 4 KiB the processor looks up an address for nearly each of them: lookups
    and updates take half of the time without. Does nothing where the system has no such pages.
    """
    with suppress(AttributeError, OSError):
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for module in sharded.modules():
            if not isinstance(module, ShardedEmbeddingBagCollection):
                continue
            for kernel in module._lookups[0]._emb_modules:
                for values in kernel.emb_module.parameters():
                    begin = -(-values.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
                    size = (values.data_ptr() + values.nbytes - begin) // _PAGE * _PAGE
                    # FBGEMM has filled them with zeros, in small pages; these are given back, and the next access makes
                    # zeros of large ones.
                    if size >= _HUGE_PAGE and advise(begin, size, _MADV_HUGEPAGE) == 0:
                        advise(begin, size, _MADV_DONTNEED)


def _check_plan(model: CtrModel, device: torch.device, plan: ShardingPlan) -> None:
    # A plan may come from a file, of another model, machine or number of ranks. TorchRec would follow it, and fail
    # later with less to say.
    planned = {name: sharding for tables in plan.plan.values() for name, sharding in tables.items()}
    rows = {name: (spec.rows, spec.dim) for name, spec in model.tables.specs.items()}
    if planned.keys() != rows.keys():
        differing = ", ".join(sorted(planned.keys() ^ rows.keys()))
        raise UserError(f"the sharding plan is not of this model: {differing} is only in one of them")
    ranks, on_shard = dist.get_world_size(), used_on_shards(model)
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
    # Before the layers are made, which are real ones even where the tables are not.
    check_dense(settings.model.hidden, max(1, len(settings.model.tasks)))
    if settings.model.mixture is not None:
        check_dense(settings.model.mixture.hidden, settings.model.mixture.experts, "model.mixture.hidden")
    model = build_model(settings.model, DataSizes.of(manifest, settings.stream), torch.device("meta"))
    # What the device cannot train is told before whether it fits.
    check_tables(model, device.type)
    if device.type == "cuda":
        compute_in(model, settings.compute)
    if plan is None:
        plan = make_plan(model, device, settings.stream.batch_size, *mean_load(manifest, settings.stream))
    return shard(model, device, plan)
