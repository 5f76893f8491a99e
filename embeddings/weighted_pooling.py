"""Weighted sums of rows, made on the shards that have the rows: D floats travel home a bag, not a row for each id.

B = bags of this rank, I = ids in them, P = parts: bags that have an id on a shard, of this rank's, one shard's after
the other's, S = shards (one a rank), F = tables, d = dim of a table, D = dim of all tables together.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag
from torchrec.distributed.types import Awaitable

from embeddings.all_to_all import Column, ColumnsAllToAll, CountsAllToAll, all_to_all_with_gradient, narrowest
from embeddings.row_wise import Bags
from embeddings.row_wise_module import RowWiseContext, RowWiseModule


class WeightedBags(NamedTuple):
    """Of one rank."""

    ids: Mapping[str, Tensor]
    """For each table, int32 or int64 (I,): the first bag's, the second's, ..."""
    weight_I: Tensor
    """float32, may require a gradient."""
    length_B: Tensor
    """Integer; bags may be empty."""


@dataclass
class PoolingContext(RowWiseContext):
    """``places``, (P,): the bag that each part belongs to."""

    bags: int = 0


class BagsAllToAll(Awaitable[list[Bags]]):
    """Second step of the input: ids and lengths, and weights whose gradients will return."""

    def __init__(self, columns: ColumnsAllToAll, weights: tuple[Tensor, ...]) -> None:
        super().__init__()
        self._columns, self._weights = columns, weights

    def _wait_impl(self) -> list[Bags]:
        found = self._columns.wait()
        rows, lengths = found[: len(self._weights)], found[len(self._weights) :]
        return [
            Bags(row_I.to(torch.int32), length_L, weight_I)
            for row_I, length_L, weight_I in zip(rows, lengths, self._weights, strict=True)
        ]


class ShardedWeightedPooling(RowWiseModule[PoolingContext]):
    """``sum_i w_i e_i`` of bags of ids, with gradients of rows and weights, of all tables side by side.

    A lookup in a sharded collection of its own does not give the weights a gradient: they travel without. And it ends
    in a reduce-scatter, where each shard answers for every bag, though few ids of a bag are on it.
    """

    def create_context(self) -> PoolingContext:
        """Of one pooling."""
        return PoolingContext()

    def input_dist(self, ctx: PoolingContext, features: WeightedBags) -> CountsAllToAll[BagsAllToAll]:
        """Send ids and weights to the shards of the ids."""
        shards, tables = self._group.size(), self._lookup.tables
        ctx.features, ctx.bags = tuple(features.ids), len(features.length_B)
        id_I = torch.cat([features.ids[feature] for feature in tables])
        blocks = torch.tensor([table.block for table in tables.values()], dtype=id_I.dtype, device=id_I.device)
        length_B = features.length_B.to(id_I.dtype)
        length_SFB, row_I, _, _, place_I = torch.ops.fbgemm.block_bucketize_sparse_features(
            length_B.repeat(len(tables)), id_I, False, True, blocks, shards
        )
        order_I = torch.empty_like(place_I)
        order_I[place_I.long()] = torch.arange(len(place_I), dtype=place_I.dtype, device=place_I.device)
        weight_I = features.weight_I.repeat(len(tables)).index_select(0, order_I)
        length_SFB = length_SFB.view(shards, len(tables), ctx.bags)
        ids_SF = length_SFB.sum(2)
        # By shard and table, as the bucketing has left them.
        by_shard = ids_SF.flatten().tolist()
        row_parts, weight_parts = row_I.split(by_shard), weight_I.split(by_shard)
        id_counts = ids_SF.T.tolist()
        rows, lengths, weights = [], [], []
        for place, table in enumerate(tables.values()):
            length_SB = length_SFB[:, place]
            shard_P, bag_P = length_SB.nonzero(as_tuple=True)
            ctx.places.append(bag_P)
            ctx.sent.append(torch.bincount(shard_P, minlength=shards).tolist())
            rows.append(torch.cat(row_parts[place :: len(tables)]).to(narrowest(table.block - 1)))
            weights.append(torch.cat(weight_parts[place :: len(tables)]))
            lengths.append(length_SB[shard_P, bag_P].to(torch.int32))

        def send(count_SX: Tensor) -> BagsAllToAll:
            counts = count_SX.T.tolist()
            ids_received, ctx.received = counts[: len(tables)], counts[len(tables) :]
            columns = [*map(Column, rows, id_counts, ids_received), *map(Column, lengths, ctx.sent, ctx.received)]
            # TorchRec divides what comes to a shard by the number of ranks; home wants its own loss's gradient.
            scale = 1 / self._lookup.gradient_scale
            travelling = all_to_all_with_gradient(
                list(map(Column, weights, id_counts, ids_received)), scale, self._group
            )
            return BagsAllToAll(ColumnsAllToAll(self._group, columns), travelling)

        parts_SF = torch.tensor(ctx.sent, device=ids_SF.device).T
        return CountsAllToAll(self._group, torch.cat([ids_SF, parts_SF], dim=1).contiguous(), send)

    def answers(self, ctx: PoolingContext, parts: tuple[Tensor, ...]) -> Iterable[Tensor]:
        """The sum of each bag, (B, d)."""
        return (_added(part_Pd, bag_P, ctx.bags) for part_Pd, bag_P in zip(parts, ctx.places, strict=True))


def _added(part_Pd: Tensor, bag_P: Tensor, bags: int) -> Tensor:
    """The sums of each bag's parts, (B, d); 0 where a bag has none."""
    first_B = torch.bincount(bag_P, minlength=bags).cumsum(0)
    first_B = torch.cat([first_B.new_zeros(1), first_B])
    return embedding_bag(bag_P.argsort(stable=True), part_Pd, first_B, mode="sum", include_last_offset=True)
