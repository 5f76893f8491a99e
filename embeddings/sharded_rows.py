"""Rows of ids, with gradient, from the shards that have them: an id travels once to its shard, its row once back.

B = ids of this rank, U = distinct ids of it, I = ids that a shard was sent by all ranks, S = shards (one a rank),
d = dim of a table, D = dim of all tables together.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import embedding
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import Awaitable, QuantizedCommCodecs, ShardedModule
from torchrec.streamable import Multistreamable

from embeddings.all_to_all import (
    Column,
    ColumnsAllToAll,
    CountsAllToAll,
    PartsAtHome,
    all_to_all_with_gradient,
    narrowest,
)
from embeddings.row_wise import Bags, RowWiseLookup


@dataclass
class RowsContext(Multistreamable):
    """What home remembers of a lookup; of each table, in the order of the lookup."""

    slots: list[Tensor] = field(default_factory=list)
    """int64 (B,): which of the distinct ids each id is."""
    sent: list[list[int]] = field(default_factory=list)
    """Distinct ids for each shard."""
    received: list[list[int]] = field(default_factory=list)
    """Ids from each rank."""
    features: tuple[str, ...] = ()
    """The order that was asked for."""

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that ``stream`` uses the tensors."""
        for slots in self.slots:
            slots.record_stream(stream)


class IdsAllToAll(Awaitable[list[Bags]]):
    """Second step of the input: the ids on their way to the shards."""

    def __init__(self, columns: ColumnsAllToAll) -> None:
        super().__init__()
        self._columns = columns

    def _wait_impl(self) -> list[Bags]:
        return [Bags(row_I.to(torch.int32)) for row_I in self._columns.wait()]


class ShardedRows(ShardedModule[list[Bags], list[Tensor], Tensor, RowsContext]):
    """Rows of ids in all tables of a collection, side by side.

    A lookup of bags of one in the collection itself ends in a reduce-scatter, where each shard answers for every bag
    of every rank with zeros for all that it does not have. It has no parameters; the rows are those of the
    collection, and so are their optimizers.

    Args:
        collection: sharded row-wise.
        codecs: of the rows and of their gradients on their way; None: as they are.
    """

    def __init__(self, collection: ShardedEmbeddingBagCollection, codecs: QuantizedCommCodecs | None = None) -> None:
        super().__init__()
        self._codecs = codecs
        self._lookup = RowWiseLookup(collection)
        self._group = self._lookup.group

    @property
    def unsharded_module_type(self) -> type[EmbeddingBagCollection]:
        """What it reads, before sharding."""
        return EmbeddingBagCollection

    def create_context(self) -> RowsContext:
        """Of one lookup."""
        return RowsContext()

    def input_dist(self, ctx: RowsContext, ids: Mapping[str, Tensor]) -> CountsAllToAll[IdsAllToAll]:
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
            ctx.slots.append(slot_B)
        count_SF = torch.stack(counts, dim=1)
        ctx.sent = count_SF.T.tolist()

        def send(count_SF: Tensor) -> IdsAllToAll:
            ctx.received = count_SF.T.tolist()
            return IdsAllToAll(ColumnsAllToAll(self._group, list(map(Column, rows, ctx.sent, ctx.received))))

        return CountsAllToAll(self._group, count_SF, send)

    def compute(self, ctx: RowsContext, dist_input: list[Bags]) -> list[Tensor]:
        """This shard's rows of the ids of all ranks: of each table (I, d)."""
        return self._lookup(dist_input)

    def output_dist(self, ctx: RowsContext, output: list[Tensor]) -> PartsAtHome:
        """Send the rows home."""
        columns = list(map(Column, output, ctx.received, ctx.sent))
        rows = all_to_all_with_gradient(columns, self._lookup.gradient_scale, self._group, self._codecs)

        def take(rows: tuple[Tensor, ...]) -> Tensor:
            # Its backward pass adds up the gradients of equal ids in one order, on a GPU too.
            taken = map(embedding, ctx.slots, rows)
            by_feature = dict(zip(self._lookup.tables, taken, strict=True))
            return torch.cat([by_feature[feature] for feature in ctx.features], dim=1)

        return PartsAtHome(rows, take)
