"""Where the rows of a row-wise sharded table are, and how to get at them without gradient.

B = ids of this rank, G = ids known to all ranks, S = shards (one a rank), R = local rows, d = dim.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbeddingBag
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import ShardingType

from embeddings.all_to_all import Column, ColumnsAllToAll
from schemas.model import INHERENT, Feature


class Bucketed(NamedTuple):
    """Ids by the shard that has their rows, one shard's after the other's, each shard's in their old order."""

    counts: list[int]
    """Of each of the S shards."""
    row_B: Tensor
    """int32 or int64: the rows, counted within their shard."""
    place_B: Tensor
    """int32 or int64: where each stood among the ids."""


class RowWiseTable:
    """A table in S equal parts, the last one shorter: row r is row ``r % block`` of shard ``r // block``.

    Args:
        local: returns the rows of this rank's shard, (R, d).
        rows: rows of the whole table.
        group: the ranks.
    """

    def __init__(self, local: Callable[[], Tensor], rows: int, group: dist.ProcessGroup) -> None:
        self._local, self.rows, self.group = local, rows, group
        self.block = -(-rows // group.size())

    @property
    def local_Rd(self) -> Tensor:
        """The rows of this rank, (R, d), without gradient."""
        return self._local().detach()

    def bucketed(self, id_B: Tensor) -> Bucketed:
        """Ids (int32 or int64) by the shard of their rows."""
        length = torch.tensor([len(id_B)], dtype=id_B.dtype, device=id_B.device)
        block = torch.tensor([self.block], dtype=id_B.dtype, device=id_B.device)
        count_S, row_B, _, place_B, _ = torch.ops.fbgemm.block_bucketize_sparse_features(
            length, id_B, True, False, block, self.group.size()
        )
        return Bucketed(count_S.tolist(), row_B, place_B)

    def fetch(self, id_B: Tensor) -> Tensor:
        """Rows of this rank's ids, (B, d): the ids travel to the shards, the rows travel back; every rank must call."""
        asked = self.bucketed(id_B)
        count_S = torch.tensor(asked.counts, device=id_B.device)
        wanted_S = torch.empty_like(count_S)
        dist.all_to_all_single(wanted_S, count_S, group=self.group)
        wanted = wanted_S.tolist()
        (row_B,) = ColumnsAllToAll(self.group, [Column(asked.row_B, asked.counts, wanted)]).wait()
        rows_Bd = self.local_Rd.index_select(0, row_B)
        (found_Bd,) = ColumnsAllToAll(self.group, [Column(rows_Bd, wanted, asked.counts)]).wait()
        in_order_Bd = torch.empty_like(found_Bd)
        in_order_Bd[asked.place_B.long()] = found_Bd
        return in_order_Bd

    def gather(self, id_G: Tensor) -> Tensor:
        """Rows of ids that all ranks know, (G, d) on all of them: each shard sends the rows that it has to all."""
        owner_G = id_G.long() // self.block
        count_S = torch.bincount(owner_G, minlength=self.group.size())
        longest = max(1, int(count_S.max()))
        rank = self.group.rank()
        local_Rd = self.local_Rd
        own = local_Rd.new_zeros(longest, local_Rd.shape[1])
        mine = id_G[owner_G == rank].long() - rank * self.block
        own[: len(mine)] = local_Rd.index_select(0, mine)
        everyone = own.new_empty(self.group.size() * longest, local_Rd.shape[1])
        dist.all_gather_into_tensor(everyone, own, group=self.group)
        order_G = torch.argsort(owner_G, stable=True)
        first_S = count_S.cumsum(0) - count_S
        place_G = torch.arange(len(id_G), device=id_G.device) - first_S[owner_G[order_G]]
        rows_Gd = everyone.new_empty(len(id_G), local_Rd.shape[1])
        rows_Gd[order_G] = everyone[owner_G[order_G] * longest + place_G]
        return rows_Gd


def row_wise_tables(collection: ShardedEmbeddingBagCollection) -> dict[Feature, RowWiseTable]:
    """The tables of a sharded collection by the feature that is looked up in them, item first; all must be row-wise."""
    assert collection._sharding_types == [ShardingType.ROW_WISE.value], collection._sharding_types
    found = {}
    for bags in collection._lookups[0]._emb_modules:
        for place, table in enumerate(bags.config.embedding_tables):
            (feature,) = table.feature_names
            found[feature] = RowWiseTable(_local_rows(bags, place), table.num_embeddings, collection._env.process_group)
    return {feature: found[feature] for feature in INHERENT if feature in found}


def _local_rows(bags: BatchedFusedEmbeddingBag, place: int) -> Callable[[], Tensor]:
    cached = bags.config.embedding_tables[place].compute_kernel is EmbeddingComputeKernel.FUSED_UVM_CACHING

    def local() -> Tensor:
        if cached:
            bags.flush()  # The newest values of some rows are in the cache alone.
        rows_Rd: Tensor = bags.split_embedding_weights()[place]
        return rows_Rd

    return local
