"""All rows of small row-wise tables, on every rank, with gradient: each shard sends what it has to all.

S = shards (one a rank), R = rows of a table, d = its dim, V = values of all tables on a shard.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

from embeddings.row_wise import Bags, RowWiseLookup


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values_V: Tensor, scale: float, group: dist.ProcessGroup) -> Tensor:
        context.scale, context.group = scale, group
        found = values_V.new_empty(group.size() * len(values_V))
        dist.all_gather_into_tensor(found, values_V.contiguous(), group=group)
        return found.view(group.size(), len(values_V))

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient_SV: Tensor) -> tuple[Tensor | None, ...]:
        gradient_V = gradient_SV.new_empty(gradient_SV.shape[1])
        dist.reduce_scatter_tensor(gradient_V, gradient_SV.flatten(), group=context.group)
        return gradient_V.mul_(context.scale), None, None


def whole_tables(collection: ShardedEmbeddingBagCollection) -> dict[str, Tensor]:
    """All rows of all tables; every rank must call it, and must go through its backward pass.

    A lookup of all rows in the collection itself would be asked of the shards by every rank apart.

    Args:
        collection: sharded row-wise; its tables are small.

    Returns:
        By the feature that is looked up in a table, (R, d).
    """
    lookup = RowWiseLookup(collection)
    shards, device = lookup.group.size(), next(iter(lookup.tables.values())).local_Rd.device
    local = {feature: len(table.local_Rd) for feature, table in lookup.tables.items()}
    rows = lookup([Bags(torch.arange(count, dtype=torch.int32, device=device)) for count in local.values()])
    blocks = [table.block for table in lookup.tables.values()]
    # The last shards are shorter; a collective needs equal parts.
    parts = [pad(part_Rd, (0, 0, 0, block - len(part_Rd))) for part_Rd, block in zip(rows, blocks, strict=True)]
    values_V = torch.cat([part_Rd.flatten() for part_Rd in parts])
    all_SV: Tensor = _AllGather.apply(values_V, lookup.gradient_scale, lookup.group)
    of_tables = all_SV.split([part_Rd.numel() for part_Rd in parts], dim=1)
    return {
        feature: of_table.reshape(shards * table.block, lookup.dims[feature])[: table.rows]
        for (feature, table), of_table in zip(lookup.tables.items(), of_tables, strict=True)
    }
