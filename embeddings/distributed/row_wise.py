"""Where the rows of row-wise sharded tables are, and how they are read there: without gradient, or by a lookup with it.

B = ids of this rank, G = ids known to all ranks, S = shards (one a rank), R = local rows, d = dim of a table.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbeddingBag
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import ShardingType

from embeddings.distributed.collectives import Column, ColumnsAllToAll, exchange_counts
from schemas.model import Feature

ROW_MARKS = "row_marks"
"""Attribute of FBGEMM's module that has `embeddings.distributed.changed_rows.RowMarks`, where its rows are watched."""


class Bucketed(NamedTuple):
    """Ids by the shard that has their rows, one shard's after the other's, each shard's in their old order."""

    count_S: Tensor
    """Integer: ids of each of the S shards."""
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
        cached: the rows are in the host's memory, and the newest values of some are in a cache on the device alone.
    """

    def __init__(self, local: Callable[[], Tensor], rows: int, group: dist.ProcessGroup, cached: bool = False) -> None:
        self._local, self.rows, self.group, self.cached = local, rows, group, cached
        # As TorchRec cuts a row-wise table (`rw_sharding.py`, `math.ceil(hash_size / world_size)`), so that ids can be
        # sent to their shards without asking the plan.
        self.block = -(-rows // group.size())

    @property
    def local_Rd(self) -> Tensor:
        """The rows of this rank, (R, d), without gradient."""
        assert not self.cached, "rows in host memory, which `embeddings.sharding.check_tables` lets no search read"
        return self._local().detach()

    @property
    def local_rows(self) -> int:
        """R."""
        return max(0, min(self.block, self.rows - self.group.rank() * self.block))

    @property
    def device(self) -> torch.device:
        """Where this rank's rows are looked up."""
        return self._local().device

    def bucketed(self, id_B: Tensor) -> Bucketed:
        """Sort ids (int32 or int64) by the shard of their rows; those of a shard keep their order, on every device."""
        return bucketed(id_B, self.block, self.group.size())

    def fetch(self, id_B: Tensor) -> Tensor:
        """Fetch the rows of this rank's ids, (B, d), without gradient; every rank must call it, if with no ids."""
        ids = self.bucketed(id_B)
        # Three exchanges: how many ids, the ids, their rows.
        (sent,), (received,) = exchange_counts(ids.count_S[:, None], self.group)
        (local_row_I,) = ColumnsAllToAll(self.group, [Column(ids.row_B, sent, received)]).wait()
        local_rows_Id = self.local_Rd.index_select(0, local_row_I)
        (by_shard_Bd,) = ColumnsAllToAll(self.group, [Column(local_rows_Id, received, sent)]).wait()
        # The rows come back in the order in which they were asked for, by shard; each is written where its id was.
        return torch.empty_like(by_shard_Bd).index_copy_(0, ids.index_B.long(), by_shard_Bd)

    def fetch_distinct(self, id_B: Tensor) -> tuple[Tensor, Tensor]:
        """Fetch the rows of the different ones of this rank's ids; every rank must call it, if with no ids.

        Returns:
            float32, at least one row, and int64 (B,), which of the rows each id has.
        """
        # A flag for each row, rather than `unique`, which would sort all ids. Counting the flags numbers them.
        present_R = torch.zeros(self.rows, dtype=torch.bool, device=self.device)
        present_R.index_fill_(0, id_B.long(), True)
        rows_Cd = self.fetch(present_R.nonzero().flatten()).float()
        rows_Cd = rows_Cd if len(rows_Cd) else rows_Cd.new_zeros(1, rows_Cd.shape[1])
        return rows_Cd, (present_R.cumsum(0) - 1).index_select(0, id_B)

    def gather(self, id_G: Tensor, held: Sequence[int] | None) -> Tensor:
        """Gather rows of ids that all ranks know, (G, d) on all of them: each shard sends what it has to all.

        Args:
            id_G: integer, the same on all ranks.
            held: how many of them each shard has; None: every rank finds it out, for which a GPU is waited for.
        """
        local_Rd, id_G = self.local_Rd, id_G.long()
        if self.group.size() == 1:
            return local_Rd.index_select(0, id_G)
        # All ranks sort alike, so each knows which shard sends which rows, and in which order.
        ids = self.bucketed(id_G)
        held = ids.count_S.tolist() if held is None else held
        rank, longest = self.group.rank(), max(1, *held)
        first = sum(held[:rank])
        # Each shard's part is filled up to the longest, because the collective needs equal parts.
        own = local_Rd.new_zeros(longest, local_Rd.shape[1])
        own[: held[rank]] = local_Rd.index_select(0, ids.row_B[first : first + held[rank]])
        everyone = own.new_empty(self.group.size() * longest, local_Rd.shape[1])
        dist.all_gather_into_tensor(everyone, own, group=self.group)
        # The n-th id of a shard lies n rows behind the shard's first.
        count_S = ids.count_S.long()
        shift_S = torch.arange(len(count_S), device=id_G.device) * longest - (count_S.cumsum(0) - count_S)
        index_G = torch.arange(len(id_G), device=id_G.device)
        index_G += shift_S.repeat_interleave(count_S, output_size=len(id_G))
        return torch.empty_like(everyone[: len(id_G)]).index_copy_(0, ids.index_B.long(), everyone[index_G])


def bucketed(id_B: Tensor, block: int, shards: int) -> Bucketed:
    """Sort ids by shard: row r is row ``r % block`` of shard ``r // block``; those of a shard keep their order.

    Args:
        id_B: int32 or int64.
        block: rows of a shard.
        shards: S.
    """
    if shards == 1:
        return Bucketed(id_B.new_full((1,), len(id_B)), id_B, torch.arange(len(id_B), device=id_B.device))
    if id_B.device.type == "cpu":
        # One table and one bag of all ids: what the operator calls the position within a bag is then the index of the
        # id. On a CPU it keeps the order of ids.
        length, blocks = (torch.tensor([number], dtype=id_B.dtype) for number in (len(id_B), block))
        count_S, row_B, _, index_B, _ = torch.ops.fbgemm.block_bucketize_sparse_features(
            length, id_B.contiguous(), True, False, blocks, shards
        )
        return Bucketed(count_S, row_B, index_B)
    return bucketed_by_sort(id_B, block, shards)


def bucketed_by_sort(id_B: Tensor, block: int, shards: int) -> Bucketed:
    """What `bucketed` returns, by a stable sort of the shards' numbers.

    FBGEMM's operator does not keep the order of ids on a GPU, and one bag of all ids is the work of a single warp.
    """
    # Few bits, which a radix sort passes over less often. Ids outside of the table go somewhere; `check_bounds` reports
    # them before anything is done with them.
    owner_B = torch.div(id_B, block, rounding_mode="floor").clamp(0, shards - 1)
    owner_B, index_B = owner_B.to(torch.int16 if shards < 2**15 else torch.int32).sort(stable=True)
    end_S = torch.searchsorted(owner_B, torch.arange(1, shards + 1, dtype=owner_B.dtype, device=id_B.device))
    row_B = id_B.index_select(0, index_B).remainder(block)
    return Bucketed(torch.diff(end_S, prepend=end_S.new_zeros(1)), row_B, index_B)


# It is no `nn.Module`, though it holds the collection's kernels: as a submodule it would name their parameters twice.
class RowWiseLookup:
    """The lookup that a sharded collection makes in this rank's shards, with ids of our own choice.

    It is the collection's own lookup kernel, so that gradients reach the rows in the backward pass, and the
    optimizers that are fused into the kernel take their step there; on a CPU it is `embeddings.distributed.host_rows`,
    which makes the same steps on the kernel's rows.

    Args:
        collection: sharded; all its tables are row-wise.
    """

    def __init__(self, collection: torch.nn.Module) -> None:
        assert isinstance(collection, ShardedEmbeddingBagCollection), collection
        self.tables = row_wise_tables(collection)
        """By the feature that is looked up in them."""
        self._kernels: list[BatchedFusedEmbeddingBag] = list(collection._lookups[0]._emb_modules)
        self.group: dist.ProcessGroup = collection._env.process_group
        # TorchRec takes each rank's loss for its own, and makes the step for the mean of all ranks' losses.
        self.gradient_scale = 1.0 / self.group.size() if get_gradient_division() else 1.0
        """What the gradients that come to a shard are multiplied by."""

    def rows(self, rows: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
        """Look up local rows, with gradient.

        Args:
            rows: by feature, integer (B,), local rows; features may have different numbers of them.

        Returns:
            By feature, float32 (B, d); of features that were asked for alone.
        """
        # A machine with GPUs never needs it.
        from embeddings.distributed.host_rows import HostTable, rows_of

        found: dict[Any, Tensor] = {}
        for kernel in self._kernels:
            tables = kernel.config.embedding_tables
            features = [table.feature_names[0] for table in tables]
            wanted = [feature for feature in features if feature in rows]
            for feature in wanted:
                number = features.index(feature)
                table = HostTable.of(kernel.emb_module, number)
                if table is not None:
                    row_B = rows[feature].long()
                    found[feature] = rows_of(table, row_B)
                    marks = getattr(kernel.emb_module, ROW_MARKS, None)
                    if marks is not None and torch.is_grad_enabled():
                        marks.of(number).index_fill_(0, row_B, True)
            if wanted and wanted[0] not in found:
                found |= self._by_kernel(kernel, {feature: rows[feature].long() for feature in wanted})
        return found

    def _by_kernel(self, kernel: BatchedFusedEmbeddingBag, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Look up local rows in FBGEMM's kernel, as bags of one."""
        tables = kernel.config.embedding_tables
        # The kernel wants as many bags in each of its tables: bags of one, and empty ones behind them. At least one
        # bag, or no gradient would pass, and the backward collectives that others wait for would not run.
        most = max(1, *map(len, rows.values()))
        device = next(iter(rows.values())).device
        ends, before = [torch.zeros(1, dtype=torch.int64, device=device)], 0
        for table in tables:
            count = len(rows.get(table.feature_names[0], ()))
            bag_B = torch.arange(before + 1, before + most + 1, device=device)
            ends.append(bag_B if count == most else bag_B.clamp(max=before + count))
            before += count
        looked_up: Tensor = kernel.emb_module(torch.cat(list(rows.values())), torch.cat(ends))
        parts = looked_up.float().split([table.local_cols for table in tables], dim=1)
        by_feature = {table.feature_names[0]: part_Bd for table, part_Bd in zip(tables, parts, strict=True)}
        return {feature: by_feature[feature][: len(row_B)] for feature, row_B in rows.items()}


def is_row_wise(collection: torch.nn.Module | None) -> bool:
    """Whether a collection is sharded, and all its tables are row-wise."""
    if not isinstance(collection, ShardedEmbeddingBagCollection):
        return False
    return bool(collection._sharding_types == [ShardingType.ROW_WISE.value])


def row_wise_tables(collection: ShardedEmbeddingBagCollection) -> dict[Feature, RowWiseTable]:
    """The tables by the feature that is looked up in them; all must be row-wise."""
    assert is_row_wise(collection), collection._sharding_types
    tables = {}
    for kernel in collection._lookups[0]._emb_modules:
        for number, table in enumerate(kernel.config.embedding_tables):
            # `embeddings.tables.collections` declares one feature a table; two would share its rows.
            (feature,) = table.feature_names
            cached = table.compute_kernel is EmbeddingComputeKernel.FUSED_UVM_CACHING
            local = _local_rows(kernel, number)
            tables[feature] = RowWiseTable(local, table.num_embeddings, collection._env.process_group, cached)
    return tables


def _local_rows(kernel: BatchedFusedEmbeddingBag, number: int) -> Callable[[], Tensor]:
    def local() -> Tensor:
        rows_Rd: Tensor = kernel.split_embedding_weights()[number]
        return rows_Rd

    return local
