"""Lookups in row-wise shards, with gradient: rows of ids, weighted sums of rows, and all rows of small tables.

An id travels once to the shard that has its row. Of a row, the row travels back once; of a weighted sum, each shard's
part of the sum, so that D floats travel back for a bag and not a row for each of its ids.

B = ids, or bags, of this rank, U = distinct ids of it, I = ids in bags, or ids that a shard was sent by all ranks,
P = parts: bags of this rank that have an id on a shard, one shard's after the other's, S = shards (one a rank),
F = tables, R = rows of a table, d = its dim, D = dim of all tables together, V = values of all tables on a shard,
X = counts for ids of all tables, then for parts of all tables.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding, embedding_bag, pad
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import Awaitable

from embeddings.distributed.collectives import (
    Column,
    ColumnsAllToAll,
    CountsAllToAll,
    all_to_all_with_gradient,
    narrowest,
)
from embeddings.distributed.row_wise import Bags, RowWiseContext, RowWiseLookup, RowWiseModule


class IdsAllToAll(Awaitable[list[Bags]]):
    """Second step of the input: the ids on their way to the shards."""

    def __init__(self, columns: ColumnsAllToAll) -> None:
        super().__init__()
        self._columns = columns

    def _wait_impl(self) -> list[Bags]:
        return [Bags(row_I.to(torch.int32)) for row_I in self._columns.wait()]


class ShardedRows(RowWiseModule[RowWiseContext]):
    """Rows of ids in all tables of a collection, side by side.

    The collection's own lookup of bags of one would end in a reduce-scatter, in which each shard sends something for
    every bag of every rank: zeros for all that it does not have.
    """

    def create_context(self) -> RowWiseContext:
        """A context for one lookup; its ``indices``, (B,), say which of the distinct ids each id is."""
        return RowWiseContext()

    def input_dist(self, ctx: RowWiseContext, ids: Mapping[str, Tensor]) -> CountsAllToAll[IdsAllToAll]:
        """Send ids to the shards of their rows.

        Args:
            ctx: a new one for this lookup.
            ids: for each table, int32 or int64 (B,).
        """
        # An id travels once however often this rank has it, so the gradients of equal ids are added up here, before one
        # row's gradient travels back.
        shards, ctx.features = self._group.size(), tuple(ids)
        rows, counts = [], []
        for feature, table in self._lookup.tables.items():
            # `unique` sorts, so that the ids of a shard lie together.
            id_U, slot_B = torch.unique(ids[feature], return_inverse=True)
            first_S = torch.arange(shards, device=id_U.device) * table.block
            # The end of the last block may lie above the table's rows, and so above what ids of int32 hold.
            end_S = torch.searchsorted(id_U, (first_S + table.block).clamp(max=table.rows).to(id_U.dtype))
            counts.append(torch.diff(end_S, prepend=end_S.new_zeros(1)))
            # Rows counted within their shard are smaller numbers, which need fewer bytes. With ``output_size``, a GPU
            # need not be waited for to know how long the result is.
            local_U = id_U - first_S.to(id_U.dtype).repeat_interleave(counts[-1], output_size=len(id_U))
            rows.append(local_U.to(narrowest(table.block - 1)))
            ctx.indices.append(slot_B)
        # One row of counts for each shard, with all tables in it: a single small exchange for all of them.
        count_SF = torch.stack(counts, dim=1)
        ctx.sent = count_SF.T.tolist()

        # Called when the counts of the other ranks have come; only then is it known how much will arrive.
        def send(count_SF: Tensor) -> IdsAllToAll:
            ctx.received = count_SF.T.tolist()
            return IdsAllToAll(ColumnsAllToAll(self._group, list(map(Column, rows, ctx.sent, ctx.received))))

        return CountsAllToAll(self._group, count_SF, send)

    def assemble(self, ctx: RowWiseContext, parts: tuple[Tensor, ...]) -> Iterable[Tensor]:
        """The row of each id, (B, d)."""
        # Not `index_select`: the backward pass of `embedding` adds up the gradients of equal ids in a fixed order, on a
        # GPU too. The parts of a table came by shard, and ids were sorted by shard: so they are the rows of the
        # distinct ids, in order.
        return map(embedding, ctx.indices, parts)


class WeightedBags(NamedTuple):
    """The bags of one rank, whose weighted sums it asks for."""

    ids: Mapping[str, Tensor]
    """For each table, int32 or int64 (I,): the first bag's, the second's, ..."""
    weight_I: Tensor
    """float32, may require a gradient."""
    length_B: Tensor
    """Integer; bags may be empty."""


@dataclass
class PoolingContext(RowWiseContext):
    """A context whose ``indices``, (P,), say which bag each part belongs to."""

    bags: int = 0
    """B."""


class BagsAllToAll(Awaitable[list[Bags]]):
    """Second step of the input: ids and lengths, and weights whose gradients will return."""

    def __init__(self, columns: ColumnsAllToAll, weights: tuple[Tensor, ...]) -> None:
        super().__init__()
        self._columns, self._weights = columns, weights

    def _wait_impl(self) -> list[Bags]:
        columns, tables = self._columns.wait(), len(self._weights)
        rows, lengths = columns[:tables], columns[tables:]
        return [
            Bags(row_I.to(torch.int32), length_L, weight_I)
            for row_I, length_L, weight_I in zip(rows, lengths, self._weights, strict=True)
        ]


class ShardedWeightedPooling(RowWiseModule[PoolingContext]):
    """The sums ``sum_i w_i e_i`` of bags of ids in all tables, side by side, with gradients of rows and weights.

    A sharded collection's own lookup gives the weights no gradient, because they travel without. And it ends in a
    reduce-scatter, in which each shard sends something for every bag, though few ids of a bag are on it.
    """

    def create_context(self) -> PoolingContext:
        """A context for one pooling."""
        return PoolingContext()

    def input_dist(self, ctx: PoolingContext, features: WeightedBags) -> CountsAllToAll[BagsAllToAll]:
        """Send ids and weights to the shards of the ids."""
        shards, tables = self._group.size(), self._lookup.tables
        ctx.features, ctx.bags = tuple(features.ids), len(features.length_B)
        id_I = torch.cat([features.ids[feature] for feature in tables])
        blocks = torch.tensor([table.block for table in tables.values()], dtype=id_I.dtype, device=id_I.device)
        length_B = features.length_B.to(id_I.dtype)
        # All tables have the same bags, but an id's shard depends on the table, so each table is cut on its own. The
        # lengths that come back are of every bag on every shard, by shard, then table, then bag.
        length_SFB, row_I, _, _, bucketed_I = torch.ops.fbgemm.block_bucketize_sparse_features(
            length_B.repeat(len(tables)), id_I, False, True, blocks, shards
        )
        # The bucketing says where each id went; weights need the inverse: which id has come to each slot.
        order_I = torch.empty_like(bucketed_I)
        order_I[bucketed_I.long()] = torch.arange(len(bucketed_I), dtype=bucketed_I.dtype, device=bucketed_I.device)
        # Not the operator's own reordering of weights: it has no gradient, `index_select` has.
        weight_I = features.weight_I.repeat(len(tables)).index_select(0, order_I)
        length_SFB = length_SFB.view(shards, len(tables), ctx.bags)
        # Counts of two kinds go to each shard: of ids, and of parts, which are the bags that have an id there.
        ids_SF = length_SFB.sum(2)
        # By shard and table, as the bucketing has left them.
        by_shard = ids_SF.flatten().tolist()
        row_parts, weight_parts = row_I.split(by_shard), weight_I.split(by_shard)
        id_counts = ids_SF.T.tolist()
        rows, lengths, weights = [], [], []
        for number, table in enumerate(tables.values()):
            # Only shards that have some of a bag's ids hear of the bag, and only they answer. `nonzero` lists the parts
            # by shard.
            length_SB = length_SFB[:, number]
            shard_P, bag_P = length_SB.nonzero(as_tuple=True)
            ctx.indices.append(bag_P)
            ctx.sent.append(torch.bincount(shard_P, minlength=shards).tolist())
            # The parts lie by shard, then table: every F-th one, from the table's own, is of the same table.
            rows.append(torch.cat(row_parts[number :: len(tables)]).to(narrowest(table.block - 1)))
            weights.append(torch.cat(weight_parts[number :: len(tables)]))
            lengths.append(length_SB[shard_P, bag_P].to(torch.int32))

        def send(count_SX: Tensor) -> BagsAllToAll:
            counts = count_SX.T.tolist()
            ids_received, ctx.received = counts[: len(tables)], counts[len(tables) :]
            columns = [*map(Column, rows, id_counts, ids_received), *map(Column, lengths, ctx.sent, ctx.received)]
            # The gradients that come to a shard are divided by the number of ranks, as TorchRec divides them. Those
            # that return to the weights are of the requesting rank's own loss, so the division is undone. TorchRec does
            # the same for collections that it knows as weighted (`CommOpGradientScaling`); these are not.
            scale = 1 / self._lookup.gradient_scale
            weight_columns = list(map(Column, weights, id_counts, ids_received))
            # Weights travel before ids on every rank: collectives match by order alone.
            received_weights = all_to_all_with_gradient(weight_columns, scale, self._group)
            return BagsAllToAll(ColumnsAllToAll(self._group, columns), received_weights)

        parts_SF = torch.tensor(ctx.sent, device=ids_SF.device).T
        return CountsAllToAll(self._group, torch.cat([ids_SF, parts_SF], dim=1).contiguous(), send)

    def assemble(self, ctx: PoolingContext, parts: tuple[Tensor, ...]) -> Iterable[Tensor]:
        """The sum of each bag, (B, d)."""
        return (_sums_of_bags(part_Pd, bag_P, ctx.bags) for part_Pd, bag_P in zip(parts, ctx.indices, strict=True))


def _sums_of_bags(part_Pd: Tensor, bag_P: Tensor, bags: int) -> Tensor:
    """The sum of each bag's parts, (B, d); 0 where a bag has none."""
    # `embedding_bag` adds a bag's parts up in the order of the shards, each time in the same; `index_add` on a GPU
    # would not. The parts of a bag came by shard, so they lie apart. A stable sort brings them together, still by
    # shard.
    first_B = torch.bincount(bag_P, minlength=bags).cumsum(0)
    first_B = torch.cat([first_B.new_zeros(1), first_B])
    return embedding_bag(bag_P.argsort(stable=True), part_Pd, first_B, mode="sum", include_last_offset=True)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values_V: Tensor, scale: float, group: dist.ProcessGroup) -> Tensor:
        context.scale, context.group = scale, group
        gathered = values_V.new_empty(group.size() * len(values_V))
        dist.all_gather_into_tensor(gathered, values_V.contiguous(), group=group)
        return gathered.view(group.size(), len(values_V))

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient_SV: Tensor) -> tuple[Tensor | None, ...]:
        gradient_V = gradient_SV.new_empty(gradient_SV.shape[1])
        # Every rank has used all rows, so a shard's gradient is the sum of what all ranks have for its rows.
        dist.reduce_scatter_tensor(gradient_V, gradient_SV.flatten(), group=context.group)
        return gradient_V.mul_(context.scale), None, None


def all_gathered_tables(collection: ShardedEmbeddingBagCollection) -> dict[str, Tensor]:
    """All rows of all tables, on every rank; every rank must call it, and must go through its backward pass.

    Each shard sends its rows to all. In the collection's own lookup, every rank would ask every shard for each row.

    Args:
        collection: sharded row-wise; its tables are small.

    Returns:
        By the feature that is looked up in a table, (R, d), with gradient.
    """
    lookup = RowWiseLookup(collection)
    shards, device = lookup.group.size(), next(iter(lookup.tables.values())).local_Rd.device
    local = {feature: len(table.local_Rd) for feature, table in lookup.tables.items()}
    # Looked up rather than read: so the gradient comes back to the kernel, whose optimizer takes its step there.
    rows = lookup([Bags(torch.arange(count, dtype=torch.int32, device=device)) for count in local.values()])
    blocks = [table.block for table in lookup.tables.values()]
    # The last shards are shorter; a collective needs equal parts.
    parts = [pad(part_Rd, (0, 0, 0, block - len(part_Rd))) for part_Rd, block in zip(rows, blocks, strict=True)]
    # One collective for all tables, whatever their dims.
    values_V = torch.cat([part_Rd.flatten() for part_Rd in parts])
    all_SV: Tensor = _AllGather.apply(values_V, lookup.gradient_scale, lookup.group)
    of_tables = all_SV.split([part_Rd.numel() for part_Rd in parts], dim=1)
    return {
        # Blocks are full until the rows end, so all filling is behind the last row.
        feature: of_table.reshape(shards * table.block, lookup.dims[feature])[: table.rows]
        for (feature, table), of_table in zip(lookup.tables.items(), of_tables, strict=True)
    }
