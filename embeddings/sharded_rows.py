"""Rows of ids, with gradient, from the shards that have them: an id travels once to its shard, its row once back.

B = ids of this rank, U = distinct ids of it, I = ids that a shard was sent by all ranks, S = shards (one a rank),
F = tables, d = dim of a table.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import embedding
from torchrec.distributed.types import Awaitable

from embeddings.all_to_all import Column, ColumnsAllToAll, CountsAllToAll, narrowest
from embeddings.row_wise import Bags
from embeddings.row_wise_module import RowWiseContext, RowWiseModule


class IdsAllToAll(Awaitable[list[Bags]]):
    """Second step of the input: the ids on their way to the shards."""

    def __init__(self, columns: ColumnsAllToAll) -> None:
        super().__init__()
        self._columns = columns

    def _wait_impl(self) -> list[Bags]:
        return [Bags(row_I.to(torch.int32)) for row_I in self._columns.wait()]


class ShardedRows(RowWiseModule[RowWiseContext]):
    """Rows of ids in all tables of a collection, side by side.

    A lookup of bags of one in the collection itself ends in a reduce-scatter, where each shard answers for every bag
    of every rank with zeros for all that it does not have.
    """

    def create_context(self) -> RowWiseContext:
        """Of one lookup; ``places``, (B,): which of the distinct ids each id is."""
        return RowWiseContext()

    def input_dist(self, ctx: RowWiseContext, ids: Mapping[str, Tensor]) -> CountsAllToAll[IdsAllToAll]:
        """Send ids to the shards of their rows.

        Args:
            ctx: of this lookup.
            ids: for each table, int32 or int64 (B,).
        """
        shards, ctx.features = self._group.size(), tuple(ids)
        rows, counts = [], []
        for feature, table in self._lookup.tables.items():
            # Sorted: so the ids of a shard are together.
            id_U, slot_B = torch.unique(ids[feature], return_inverse=True)
            first_S = torch.arange(shards, device=id_U.device) * table.block
            end_S = torch.searchsorted(id_U, (first_S + table.block).clamp(max=table.rows).to(id_U.dtype))
            counts.append(torch.diff(end_S, prepend=end_S.new_zeros(1)))
            local_U = id_U - first_S.to(id_U.dtype).repeat_interleave(counts[-1], output_size=len(id_U))
            rows.append(local_U.to(narrowest(table.block - 1)))
            ctx.places.append(slot_B)
        count_SF = torch.stack(counts, dim=1)
        ctx.sent = count_SF.T.tolist()

        def send(count_SF: Tensor) -> IdsAllToAll:
            ctx.received = count_SF.T.tolist()
            return IdsAllToAll(ColumnsAllToAll(self._group, list(map(Column, rows, ctx.sent, ctx.received))))

        return CountsAllToAll(self._group, count_SF, send)

    def answers(self, ctx: RowWiseContext, parts: tuple[Tensor, ...]) -> Iterable[Tensor]:
        """The row of each id, (B, d)."""
        # Its backward pass adds up the gradients of equal ids in one order, on a GPU too.
        return map(embedding, ctx.places, parts)
