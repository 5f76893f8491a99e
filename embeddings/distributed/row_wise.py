"""Where the rows of row-wise sharded tables are, how to read them, and what lookups of them with gradient share.

In a lookup ids travel to the shards that have their rows, and parts of the result travel back to the rank that has
asked ("the requesting rank").

B = ids of this rank, G = ids known to all ranks, S = shards (one a rank), R = local rows, d = dim of a table, U =
distinct ids, I = ids in a lookup, L = bags in it, the most of a table, P = parts that travel back, D = dim of all
tables of a collection together.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbeddingBag
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import QuantizedCommCodecs, ShardedModule, ShardingType
from torchrec.streamable import Multistreamable

from embeddings.distributed.collectives import Column, ColumnsAllToAll, ReturnedParts, all_to_all_with_gradient
from schemas.model import INHERENT, Feature


class Bucketed(NamedTuple):
    """Ids by the shard that has their rows, one shard's after the other's, each shard's in their old order."""

    counts: list[int]
    """Ids of each of the S shards."""
    row_B: Tensor
    """int32 or int64: the rows, counted within their shard."""
    index_B: Tensor
    """int32 or int64: which of the ids, in their old order, each one is."""


class RowWiseTable:
    """A table in S equal parts, the last one shorter: row r is row ``r % block`` of shard ``r // block``.

    Args:
        local: returns the rows of this rank's shard, (R, d).
        rows: rows of the whole table.
        group: the ranks.
    """

    def __init__(self, local: Callable[[], Tensor], rows: int, group: dist.ProcessGroup) -> None:
        self._local, self.rows, self.group = local, rows, group
        # As TorchRec cuts a row-wise table (`rw_sharding.py`, `math.ceil(hash_size / world_size)`), so that ids can be
        # sent to their shards without asking the plan.
        self.block = -(-rows // group.size())

    @property
    def local_Rd(self) -> Tensor:
        """The rows of this rank, (R, d), without gradient."""
        # Asked for anew each time, because the newest values may lie in a cache that `_local` writes back first.
        return self._local().detach()

    def bucketed(self, id_B: Tensor) -> Bucketed:
        """Sort ids (int32 or int64) by the shard of their rows; those of a shard keep their order."""
        # One table and one bag of all ids: what the operator calls the position within a bag is then the index of the
        # id.
        length = torch.tensor([len(id_B)], dtype=id_B.dtype, device=id_B.device)
        block = torch.tensor([self.block], dtype=id_B.dtype, device=id_B.device)
        count_S, row_B, _, index_B, _ = torch.ops.fbgemm.block_bucketize_sparse_features(
            length, id_B, True, False, block, self.group.size()
        )
        # On a GPU, `tolist` waits for the device: the collectives need their sizes on the host.
        return Bucketed(count_S.tolist(), row_B, index_B)

    def fetch(self, id_B: Tensor) -> Tensor:
        """Fetch the rows of this rank's ids, (B, d), without gradient; every rank must call it, if with no ids."""
        ids = self.bucketed(id_B)
        # Three exchanges: how many ids, the ids, their rows.
        sent_S = torch.tensor(ids.counts, device=id_B.device)
        received_S = torch.empty_like(sent_S)
        dist.all_to_all_single(received_S, sent_S, group=self.group)
        received = received_S.tolist()
        (local_row_I,) = ColumnsAllToAll(self.group, [Column(ids.row_B, ids.counts, received)]).wait()
        local_rows_Id = self.local_Rd.index_select(0, local_row_I)
        (by_shard_Bd,) = ColumnsAllToAll(self.group, [Column(local_rows_Id, received, ids.counts)]).wait()
        # The rows come back in the order in which they were asked for, by shard; each is written where its id was.
        rows_Bd = torch.empty_like(by_shard_Bd)
        rows_Bd[ids.index_B.long()] = by_shard_Bd
        return rows_Bd

    def gather(self, id_G: Tensor) -> Tensor:
        """Gather rows of ids that all ranks know, (G, d) on all of them: each shard sends what it has to all, once."""
        id_U, slot_G = torch.unique(id_G.long(), return_inverse=True)  # sorted, so by shard
        # All ranks have the same ids, so each knows which shard sends which rows, and no counts need to travel.
        owner_U = id_U // self.block
        count_S = torch.bincount(owner_U, minlength=self.group.size())
        longest = max(1, int(count_S.max()))
        rank = self.group.rank()
        local_Rd = self.local_Rd
        own = local_Rd.new_zeros(longest, local_Rd.shape[1])
        mine = id_U[owner_U == rank] - rank * self.block
        own[: len(mine)] = local_Rd.index_select(0, mine)
        everyone = own.new_empty(self.group.size() * longest, local_Rd.shape[1])
        dist.all_gather_into_tensor(everyone, own, group=self.group)
        # Each shard's part is padded to the longest, because the collective needs equal parts.
        first_S = count_S.cumsum(0) - count_S
        index_U = torch.arange(len(id_U), device=id_U.device) - first_S[owner_U] + owner_U * longest
        return everyone.index_select(0, index_U[slot_G])


class Bags(NamedTuple):
    """Bags of local rows to be summed, of one table, on this rank's shard of it."""

    row_I: Tensor
    """int32 or int64, local rows: the first bag's, the second's, ..."""
    length_L: Tensor | None = None
    """Integer; None: bags of one."""
    weight_I: Tensor | None = None
    """float32, may require a gradient; of all tables, or of none."""


# It is no `nn.Module`, though it holds the collection's kernels: as a submodule it would name their parameters twice.
class RowWiseLookup:
    """The lookup that a sharded collection makes in this rank's shards, with ids of our own choice.

    It is the collection's own lookup kernel, so that gradients reach the rows in the backward pass, and the
    optimizers that are fused into the kernel take their step there.

    Args:
        collection: sharded; all its tables are row-wise.
    """

    def __init__(self, collection: ShardedEmbeddingBagCollection) -> None:
        assert is_row_wise(collection), collection._sharding_types
        tables = _tables(collection)
        # TorchRec has one sharding and one lookup for each sharding type: here the row-wise one alone. It groups a
        # rank's tables by type, kernel and optimizer, so the order of a lookup may differ from that of the declaration;
        # the features of the sharding are in the lookup's order.
        (sharding,), (self._lookup,) = collection._embedding_shardings, collection._lookups
        self.tables = {feature: tables[feature] for feature in sharding.feature_names()}
        """By the feature that is looked up in them, in the order of the lookup."""
        self.dims = dict(zip(self.tables, sharding.embedding_dims(), strict=True))
        self.group: dist.ProcessGroup = collection._env.process_group
        # TorchRec takes each rank's loss for its own, and makes the step for the mean of all ranks' losses.
        self.gradient_scale = 1.0 / self.group.size() if get_gradient_division() else 1.0
        """What the gradients that come to a shard are multiplied by."""

    def __call__(self, bags: Sequence[Bags]) -> list[Tensor]:
        """Sum the local rows of bags, weighted.

        Args:
            bags: of each table, in the order of ``tables``.

        Returns:
            For each table, the sums of its bags, (bags, d).
        """
        device = bags[0].row_I.device
        lengths = [
            torch.ones(len(row_I), dtype=torch.int32, device=device) if length_L is None else length_L.to(torch.int32)
            for row_I, length_L, _ in bags
        ]
        # The kernel wants as many bags in each table. At least one: else no gradient would pass through it, and the
        # backward collectives of this rank, which the others wait for, would not run.
        most = max(1, *map(len, lengths))
        weights = [weight_I for _, _, weight_I in bags if weight_I is not None]
        # `None` for all weights, not ones: unweighted bags have a kernel of their own. Lengths lie table by table, as
        # the values do, and bags that fill a table up to ``most`` are empty, so they move no offset of a real one.
        features = KeyedJaggedTensor(
            keys=list(self.tables),
            values=torch.cat([row_I for row_I, _, _ in bags]),
            lengths=torch.cat([torch.nn.functional.pad(length_L, (0, most - len(length_L))) for length_L in lengths]),
            weights=torch.cat(weights) if weights else None,
            stride=most,
        )
        rows_LD: Tensor = self._lookup(features)
        parts = rows_LD.split(list(self.dims.values()), dim=1)
        return [part_Ld[: len(length_L)] for part_Ld, length_L in zip(parts, lengths, strict=True)]


def is_row_wise(collection: torch.nn.Module | None) -> bool:
    """Whether a collection is sharded, and all its tables are row-wise."""
    if not isinstance(collection, ShardedEmbeddingBagCollection):
        return False
    return bool(collection._sharding_types == [ShardingType.ROW_WISE.value])


def row_wise_tables(collection: ShardedEmbeddingBagCollection) -> dict[Feature, RowWiseTable]:
    """The tables of inherent features by the feature that is looked up in them, item first; all must be row-wise."""
    assert is_row_wise(collection), collection._sharding_types
    tables = _tables(collection)
    return {feature: tables[feature] for feature in INHERENT if feature in tables}


def _tables(collection: ShardedEmbeddingBagCollection) -> dict[str, RowWiseTable]:
    tables = {}
    for kernel in collection._lookups[0]._emb_modules:
        for number, table in enumerate(kernel.config.embedding_tables):
            # `embeddings.tables.collections` declares one feature a table; two would share its rows.
            (feature,) = table.feature_names
            local = _local_rows(kernel, number)
            tables[feature] = RowWiseTable(local, table.num_embeddings, collection._env.process_group)
    return tables


def _local_rows(kernel: BatchedFusedEmbeddingBag, number: int) -> Callable[[], Tensor]:
    cached = kernel.config.embedding_tables[number].compute_kernel is EmbeddingComputeKernel.FUSED_UVM_CACHING

    def local() -> Tensor:
        if cached:
            kernel.flush()  # The newest values of some rows are in the cache alone.
        rows_Rd: Tensor = kernel.split_embedding_weights()[number]
        return rows_Rd

    return local


@dataclass
class RowWiseContext(Multistreamable):
    """What the requesting rank remembers of a lookup; lists have an entry for each table, in the lookup's order."""

    indices: list[Tensor] = field(default_factory=list)
    """int64: how parts and results belong to each other; each kind of lookup says how."""
    sent: list[list[int]] = field(default_factory=list)
    """Parts that this rank requests of each shard."""
    received: list[list[int]] = field(default_factory=list)
    """Parts that each rank requests of this shard."""
    features: tuple[str, ...] = ()
    """The order in which the result has the features side by side."""

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that ``stream`` uses the tensors."""
        for index in self.indices:
            index.record_stream(stream)


C = TypeVar("C", bound=RowWiseContext)


class RowWiseModule(ShardedModule[list[Bags], list[Tensor], Tensor, C]):
    """A lookup in the shards of a collection, with gradient.

    It has no parameters: the rows are those of the collection, and so are their optimizers.

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
        """The module whose tables it reads, before sharding."""
        unsharded: type[EmbeddingBagCollection] = EmbeddingBagCollection
        return unsharded

    def compute(self, ctx: C, dist_input: list[Bags]) -> list[Tensor]:
        """Make the parts that this shard has of all ranks' results: for each table (parts, d)."""
        return self._lookup(dist_input)

    def output_dist(self, ctx: C, output: list[Tensor]) -> ReturnedParts:
        """Send the parts back to the ranks that have requested them."""
        # The way back: a shard returns as many parts to each rank as that rank requested of it.
        columns = list(map(Column, output, ctx.received, ctx.sent))
        parts = all_to_all_with_gradient(columns, self._lookup.gradient_scale, self._group, self._codecs)

        def joined(parts: tuple[Tensor, ...]) -> Tensor:
            by_feature = dict(zip(self._lookup.tables, self.assemble(ctx, parts), strict=True))
            return torch.cat([by_feature[feature] for feature in ctx.features], dim=1)

        return ReturnedParts(parts, joined)

    def assemble(self, ctx: C, parts: tuple[Tensor, ...]) -> Iterable[Tensor]:
        """Make the result of each table, (B, d), in the order of the lookup, of its parts (P, d)."""
        raise NotImplementedError
