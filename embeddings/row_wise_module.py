"""What lookups in row-wise shards share: what is asked travels to the shards, parts of the answer travel home.

P = parts that come home, d = dim of a table.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import QuantizedCommCodecs, ShardedModule
from torchrec.streamable import Multistreamable

from embeddings.all_to_all import Column, PartsAtHome, all_to_all_with_gradient
from embeddings.row_wise import Bags, RowWiseLookup


@dataclass
class RowWiseContext(Multistreamable):
    """What home remembers of what it asked; of each table, in the order of the lookup."""

    places: list[Tensor] = field(default_factory=list)
    """int64: how the parts belong to what was asked."""
    sent: list[list[int]] = field(default_factory=list)
    """Parts asked of each shard."""
    received: list[list[int]] = field(default_factory=list)
    """Parts that each rank asks of this shard."""
    features: tuple[str, ...] = ()
    """The order that was asked for."""

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that ``stream`` uses the tensors."""
        for place in self.places:
            place.record_stream(stream)


C = TypeVar("C", bound=RowWiseContext)


class RowWiseModule(ShardedModule[list[Bags], list[Tensor], Tensor, C]):
    """A lookup in the shards of a collection, with gradient.

    It has no parameters; the rows are those of the collection, and so are their optimizers.

    Args:
        collection: sharded row-wise.
        codecs: of the parts and of their gradients on their way; None: as they are.
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

    def compute(self, ctx: C, dist_input: list[Bags]) -> list[Tensor]:
        """What this shard has of the answers to all ranks: of each table (its parts, d)."""
        return self._lookup(dist_input)

    def output_dist(self, ctx: C, output: list[Tensor]) -> PartsAtHome:
        """Send the parts home."""
        columns = list(map(Column, output, ctx.received, ctx.sent))
        parts = all_to_all_with_gradient(columns, self._lookup.gradient_scale, self._group, self._codecs)

        def answer(parts: tuple[Tensor, ...]) -> Tensor:
            by_feature = dict(zip(self._lookup.tables, self.answers(ctx, parts), strict=True))
            return torch.cat([by_feature[feature] for feature in ctx.features], dim=1)

        return PartsAtHome(parts, answer)

    def answers(self, ctx: C, parts: tuple[Tensor, ...]) -> Iterable[Tensor]:
        """Of each table, in the order of the lookup, what was asked for; made of its parts (P, d)."""
        raise NotImplementedError
