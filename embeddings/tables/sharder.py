"""How TorchRec may shard the tables: what its planner chooses from, and what its kernels are told."""

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embedding_sharding import USE_ONE_TBE_PER_TABLE
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingType

from schemas.model import Memory

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
        """Shard a collection; the tables of one of items and their features have a kernel each.

        A kernel looks up as many bags in each of its tables, and an item table is asked for other ids than a small one.
        """
        apart = any(spec.feature_names == ["item"] for spec in module.embedding_bag_configs())
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
