"""Weighted sums of rows, made on the shards that have the rows: D floats travel home a bag, not a row for each id.

B = bags of this rank, the same number on all ranks, I = ids in them, S = shards (one a rank), F = features,
D = dim of all features together.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionAwaitable, ShardedEmbeddingBagCollection
from torchrec.distributed.types import Awaitable, LazyAwaitable, ShardedModule
from torchrec.streamable import Multistreamable

from embeddings.all_to_all import Column, ColumnsAllToAll, all_to_all_with_gradient
from embeddings.row_wise import row_wise_tables


@dataclass
class PoolingContext(Multistreamable):
    """What home remembers of a pooling."""

    bags: int = 0

    def record_stream(self, stream: torch.Stream) -> None:
        """Nothing to tell the allocator: no tensors."""


class LengthsAllToAll(Awaitable["BagsAllToAll"]):
    """First step of the input: how long each bag is on each shard; `wait` starts the second."""

    def __init__(self, group: dist.ProcessGroup, length_SFB: Tensor, send: Callable[[Tensor], "BagsAllToAll"]) -> None:
        super().__init__()
        self._send = send
        self._sent, self._received = length_SFB, torch.empty_like(length_SFB)
        self._work = dist.all_to_all_single(self._received, self._sent, group=group, async_op=True)

    def _wait_impl(self) -> "BagsAllToAll":
        self._work.wait()
        return self._send(self._received)


class BagsAllToAll(Awaitable[KeyedJaggedTensor]):
    """Second step of the input: ids, and weights whose gradients will return."""

    def __init__(self, ids: ColumnsAllToAll, weights: Tensor, bags: Callable[[Tensor, Tensor], KeyedJaggedTensor]):
        super().__init__()
        self._ids, self._weights, self._bags = ids, weights, bags

    def _wait_impl(self) -> KeyedJaggedTensor:
        (ids,) = self._ids.wait()
        return self._bags(ids, self._weights)


class ShardedWeightedPooling(ShardedModule[KeyedJaggedTensor, Tensor, KeyedTensor, PoolingContext]):
    """``sum_i w_i e_i`` of bags of ids, with gradients of rows and weights.

    A lookup in a sharded collection of its own does not give the weights a gradient: they travel without.
    It has no parameters; the rows are those of the collection, and so are their optimizer and the way home.

    Args:
        collection: sharded row-wise.
    """

    def __init__(self, collection: ShardedEmbeddingBagCollection) -> None:
        super().__init__()
        tables = row_wise_tables(collection)
        (self._sharding,), (self._lookup,), (self._output_dist,) = (
            collection._embedding_shardings,
            collection._lookups,
            collection._output_dists,
        )
        self._features: list[str] = self._sharding.feature_names()
        self._blocks = [tables[feature].block for feature in self._features]
        self._group = tables[self._features[0]].group

    @property
    def unsharded_module_type(self) -> type[EmbeddingBagCollection]:
        """What it reads, before sharding."""
        return EmbeddingBagCollection

    def create_context(self) -> PoolingContext:
        """Of one pooling."""
        return PoolingContext()

    def input_dist(self, ctx: PoolingContext, features: KeyedJaggedTensor) -> LengthsAllToAll:
        """Send ids and weights to the shards of the ids.

        Args:
            ctx: of this pooling.
            features: B bags of each feature; the same B on all ranks. Its weights may require a gradient.
        """
        features = features.permute([features.keys().index(feature) for feature in self._features])
        ctx.bags = features.stride()
        shards = self._group.size()
        blocks = torch.tensor(self._blocks, dtype=features.values().dtype, device=features.values().device)
        length_SFB, row_I, _, _, place_I = torch.ops.fbgemm.block_bucketize_sparse_features(
            features.lengths(), features.values(), False, True, blocks, shards
        )
        sent = length_SFB.view(shards, -1).sum(1).tolist()
        order_I = torch.empty_like(place_I)
        order_I[place_I.long()] = torch.arange(len(place_I), dtype=place_I.dtype, device=place_I.device)
        weight_I = features.weights().index_select(0, order_I)
        # TorchRec divides what comes back through a lookup by the number of ranks; home wants its own loss's gradient.
        scale = float(shards if get_gradient_division() else 1)

        def send(length_SFB: Tensor) -> BagsAllToAll:
            received = length_SFB.view(shards, -1).sum(1).tolist()
            ids = ColumnsAllToAll(self._group, [Column(row_I, sent, received)])
            weights = all_to_all_with_gradient(weight_I, sent, received, scale, self._group)
            return BagsAllToAll(ids, weights, lambda ids, weights: self._bags(length_SFB, ids, weights))

        return LengthsAllToAll(self._group, length_SFB, send)

    def _bags(self, length_SFB: Tensor, row_I: Tensor, weight_I: Tensor) -> KeyedJaggedTensor:
        """What came from one rank after the other, by feature."""
        shards, count = self._group.size(), len(self._features)
        by_rank = torch.arange(shards * count, dtype=torch.int32, device=row_I.device)
        by_feature = by_rank.view(shards, count).T.flatten()
        place_I = torch.arange(len(row_I), device=row_I.device)
        length_FSB, order_I, _ = torch.ops.fbgemm.permute_2D_sparse_data(
            by_feature, length_SFB.view(shards * count, -1), place_I
        )
        return KeyedJaggedTensor(
            keys=self._features,
            values=row_I[order_I],
            weights=weight_I[order_I],
            lengths=length_FSB.flatten(),
            stride=shards * (length_SFB.numel() // (shards * count)),
        )

    def compute(self, ctx: PoolingContext, dist_input: KeyedJaggedTensor) -> Tensor:
        """This shard's part of the sums, for the bags of all ranks."""
        pooled: Tensor = self._lookup(dist_input)
        return pooled

    def output_dist(self, ctx: PoolingContext, output: Tensor) -> LazyAwaitable[KeyedTensor]:
        """Add the parts of all shards, each bag's at its home."""
        context = EmbeddingShardingContext(batch_size_per_rank=[ctx.bags] * self._group.size())
        return EmbeddingBagCollectionAwaitable(
            awaitables=[self._output_dist(output, context)],
            embedding_dims=self._sharding.embedding_dims(),
            embedding_names=self._sharding.embedding_names(),
        )
