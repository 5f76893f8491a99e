"""Search where the rows live: behaviours' ids go to the shards of the item table, the K best of each shard come back.

`SearchHandle` is a search of one batch, from its start to its result; `ShardedTopK` is the `ShardedModule` behind it,
whose steps are TorchRec's: input_dist, compute, output_dist.

T = targets of this rank, G = targets of all ranks, S = shards (one a rank), W = (target, behaviour) pairs, K = kept,
F = behaviours that all shards have selected for this rank: shard 0 for the first target, for the second, ..., then
shard 1, ..., L = most of them for a target, D = dim of the item and category tables together, C = categories that a
shard has met, R = all categories, d = their dim.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import Awaitable, LazyAwaitable, QuantizedCommCodecs, ShardedModule
from torchrec.streamable import Multistreamable

from embeddings.batch import Batch, Selection
from embeddings.distributed.collectives import Column, ColumnsAllToAll, codecs_of, narrowest
from embeddings.distributed.row_wise import row_wise_tables
from embeddings.layers.scoring import DotProduct
from embeddings.search.messages import LocalWindows, SearchMessages, SearchSizes, ShardHistory, ShardInput
from embeddings.search.pairs import Pairs, cross_score, search_rows, small_table_score
from embeddings.search.topk.api import top_k
from embeddings.search.topk.inputs import TopKInputs
from embeddings.search.topk.keys import NOTHING, ordered
from embeddings.sizes import DataSizes
from embeddings.tables.collections import CrossRows
from schemas.model import Feature


@dataclass(frozen=True)
class ShardBest:
    """The K best of a sequence's behaviours on a shard."""

    score_GK: Tensor
    """float32"""
    local_index_GK: Tensor
    """int64, counted in the part of the window that is on the shard; negative where there are fewer than K."""
    count_G: Tensor
    """int64, how many there are."""


@dataclass
class TopKContext(Multistreamable):
    """What the sample's rank remembers of a search between its steps."""

    windows: dict[str, LocalWindows] = field(default_factory=dict)
    """By sequence."""
    sizes: SearchSizes = field(default_factory=lambda: SearchSizes((), {}, 0))
    """Known when all ranks have sent theirs."""
    target_cross: CrossRows = field(default_factory=dict)
    """By sequence, all rows of the targets' cross tables, as they are when `compute` is called."""
    history_cross: CrossRows = field(default_factory=dict)
    """By sequence, all rows of the behaviours' cross tables, as they are when `compute` is called."""

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that ``stream`` uses the tensors."""
        for windows in self.windows.values():
            windows.record_stream(stream)


class BehaviorsAllToAll(Awaitable[ShardInput]):
    """Second step of the input: targets, behaviours and windows on their way to the shards."""

    def __init__(self, columns: ColumnsAllToAll, unpack: Callable[[list[Tensor]], ShardInput]) -> None:
        super().__init__()
        self._columns, self._unpack = columns, unpack

    def _wait_impl(self) -> ShardInput:
        return self._unpack(self._columns.wait())


class SizesAllGather(Awaitable[BehaviorsAllToAll]):
    """First step of the input: how much each rank sends to each; `wait` starts the second."""

    def __init__(self, group: dist.ProcessGroup, sizes: Tensor, send: Callable[[Tensor], BehaviorsAllToAll]) -> None:
        super().__init__()
        self._send = send
        self._sizes = sizes.new_empty(group.size() * len(sizes))
        self._work = dist.all_gather_into_tensor(self._sizes, sizes, group=group, async_op=True)

    def _wait_impl(self) -> BehaviorsAllToAll:
        self._work.wait()
        return self._send(self._sizes)


class ScoresAllToAll(LazyAwaitable[dict[str, Selection]]):
    """The output: scores and indices on their way back to the samples' ranks, where they are merged."""

    def __init__(self, columns: ColumnsAllToAll, merge: Callable[[list[Tensor]], dict[str, Selection]]) -> None:
        super().__init__()
        self._columns, self._merge = columns, merge

    def _wait_impl(self) -> dict[str, Selection]:
        return self._merge(self._columns.wait())


class ShardedTopK(ShardedModule[ShardInput, dict[str, ShardBest], dict[str, Selection], TopKContext]):
    """The K best behaviours of each target in each sequence, by a score that is a dot product of rows. No gradient.

    It has no parameters of its own: it reads those of sharded collections whose tables are row-wise.

    - input_dist: a user's behaviours travel once, whatever the number of the user's targets, to the shards of their
      items: row, category, index, ..., and each target's window in them;
    - compute: the shards send each other the targets' item rows, and fetch the rows of the categories that they were
      sent; then each keeps the K best of its own behaviours for each target of all ranks;
    - output_dist: at most K scores and indices a target and shard travel back, and are merged into K.

    Args:
        targets: the sharded collection that targets are looked up in.
        history: the one that behaviours are looked up in, often the same.
        scoring: the score.
        retrieved: K by sequence.
        sizes: of the data: lengths of the sequences, rows of the tables.
        cross: the cross features that the score is made of.
        codecs: of the scores on their way back; None: as they are.
    """

    def __init__(
        self,
        targets: ShardedEmbeddingBagCollection,
        history: ShardedEmbeddingBagCollection,
        scoring: DotProduct,
        retrieved: Mapping[str, int],
        sizes: DataSizes,
        cross: Sequence[Feature],
        codecs: QuantizedCommCodecs | None = None,
    ) -> None:
        super().__init__()
        self._codec = (codecs or codecs_of("fp32")).forward
        self._target_tables, history_tables = row_wise_tables(targets), row_wise_tables(history)
        self._scoring, self._retrieved, self._lengths = scoring, dict(retrieved), sizes.lengths
        # The item table is by far the largest, so it decides where a behaviour goes; all else travels there.
        self._item, self._category = history_tables["item"], history_tables.get("category")
        self._group = self._item.group
        self._messages = SearchMessages((*history_tables, *cross), self._item.block, sizes)

    @property
    def unsharded_module_type(self) -> type[EmbeddingBagCollection]:
        """The module whose tables it reads, before sharding."""
        unsharded: type[EmbeddingBagCollection] = EmbeddingBagCollection
        return unsharded

    def create_context(self) -> TopKContext:
        """A context for one search."""
        return TopKContext()

    @torch.no_grad()
    def input_dist(self, ctx: TopKContext, batch: Batch) -> SizesAllGather:
        """Send the targets and histories of this rank to the shards."""
        for sequence in self._retrieved:
            history = batch.histories[sequence]
            ctx.windows[sequence] = LocalWindows.of(history, self._item.bucketed(history.item_M))
        earliest, span = self._messages.times(batch)

        def send(gathered: Tensor) -> BehaviorsAllToAll:
            # Called when all ranks have said their sizes, which types and lengths of the columns depend on.
            ctx.sizes = sizes = self._sizes(gathered)
            columns = self._messages.target_columns(batch, earliest, sizes.targets)
            for sequence, windows in ctx.windows.items():
                columns += self._messages.history_columns(sequence, batch, windows, earliest, sizes)
            all_to_all = ColumnsAllToAll(self._group, columns)
            return BehaviorsAllToAll(all_to_all, lambda received: self._messages.unpack(received, sizes))

        # An all-gather, not an all-to-all of counts: a shard needs the number of targets of every rank, and the longest
        # span.
        counts = [count for windows in ctx.windows.values() for count in windows.behaviors.counts]
        return SizesAllGather(self._group, torch.tensor([len(batch), span, *counts], device=batch.item_T.device), send)

    def _sizes(self, gathered: Tensor) -> SearchSizes:
        """What all ranks have said of themselves: targets, span, behaviours for each shard of each sequence."""
        ranks, rank = self._group.size(), self._group.rank()
        # Of each rank: targets, span, then for each sequence the behaviours for each shard; this shard's column is
        # taken.
        by_rank = gathered.view(ranks, -1)
        to_this_shard = by_rank[:, 2:].view(ranks, len(self._retrieved), ranks)[:, :, rank].T.tolist()
        behaviors = dict(zip(self._retrieved, to_this_shard, strict=True))
        return SearchSizes(by_rank[:, 0].tolist(), behaviors, int(by_rank[:, 1].max()))

    @torch.no_grad()
    def compute(self, ctx: TopKContext, dist_input: ShardInput) -> dict[str, ShardBest]:
        """Find the K best of this shard, by sequence; the context must have the rows of the cross tables."""
        targets = dist_input.targets
        # Rows of the targets first, on all shards alike. They are read here and not in `input_dist`, so that they are
        # those of this step even where the ids were sent ahead.
        rows = [table.gather(targets.columns[feature]).float() for feature, table in self._target_tables.items()]
        target_GD = torch.cat(rows, dim=1)
        # This fetch is a collective: it comes once for all sequences, outside of the loop, and in the same place on all
        # ranks.
        categories = self._categories(dist_input.histories)
        best = {}
        for sequence, history in dist_input.histories.items():
            k = self._retrieved[sequence]
            query = self._scoring.queries(search_rows(target_GD, targets.row, ctx.target_cross[sequence]))
            # The query of the inherent features is cut again into those of item and category, whose rows are in
            # different places.
            dims = [part.shape[1] for part in rows]
            inherent = dict(zip(self._target_tables, query.inherent.split(dims, dim=1), strict=True))
            pairs = Pairs(history.start_G, history.end_G, len(history.columns["item"]))
            row = partial(history.row, targets=targets, pairs=pairs)
            additive_W = cross_score(pairs, query.cross, row, ctx.history_cross[sequence])
            if categories:
                # A behaviour's category row lies on another shard than its item row, so its part of the score is
                # made of the few rows that were fetched, and added.
                rows_Cd, slot_R = categories
                slot_W = pairs.of_behaviors(slot_R.index_select(0, history.columns["category"].to(torch.int32)))
                additive_W += small_table_score(pairs, inherent["category"], rows_Cd, slot_W)
            # The item part is the large one, and is made by the kernel, from rows that do not leave this shard.
            score_GK, index_GK = top_k(
                TopKInputs(
                    rows_RD=self._item.local_Rd,
                    ids_M=history.columns["item"].to(torch.int32),
                    start_T=history.start_G,
                    end_T=history.end_G,
                    query_TD=inherent["item"].contiguous(),
                    additive_W=additive_W,
                    k=k,
                )
            )
            count_G = (history.end_G - history.start_G).clamp(max=k)
            best[sequence] = ShardBest(score_GK, index_GK - history.start_G[:, None], count_G)
        return best

    def _categories(self, histories: Mapping[str, ShardHistory]) -> tuple[Tensor, Tensor] | None:
        """Rows of the categories that this shard has met, float32 (C, d), and which of the C each category is, (R,)."""
        if self._category is None:
            return None
        # A flag for each category, rather than `unique`, which would sort all behaviours. Counting the flags numbers
        # them.
        present_R = torch.zeros(self._category.rows, dtype=torch.bool, device=self._item.local_Rd.device)
        for history in histories.values():
            present_R[history.columns["category"].long()] = True
        return self._category.fetch(present_R.nonzero().flatten()).float(), present_R.cumsum(0) - 1

    @torch.no_grad()
    def output_dist(self, ctx: TopKContext, output: dict[str, ShardBest]) -> ScoresAllToAll:
        """Send the best of this shard back to the samples' ranks, and merge what comes back to this one."""
        columns, counts = [], {}
        for sequence, best in output.items():
            k = self._retrieved[sequence]
            # How much each shard sends back is known here already: all of a window that it has, up to K.
            counts[sequence] = ctx.windows[sequence].length_ST.clamp(max=k)
            sent = [int(part.sum()) for part in best.count_G.split(ctx.sizes.targets)]
            received = counts[sequence].sum(1).tolist()
            # Only what is there travels. The best come first, so the rest of a row of K is filling.
            valid_GK = torch.arange(k, device=best.count_G.device) < best.count_G[:, None]
            indices = best.local_index_GK[valid_GK].to(narrowest(self._lengths[sequence] - 1))
            scores = self._codec.encode(best.score_GK[valid_GK])
            columns += [Column(scores, sent, received), Column(indices, sent, received)]

        def merge(columns: list[Tensor]) -> dict[str, Selection]:
            selected, rest = {}, iter(columns)
            for sequence, count_ST in counts.items():
                score_F, index_F = next(rest), ctx.windows[sequence].index_of(count_ST, next(rest))
                selected[sequence] = merged(count_ST, self._codec.decode(score_F), index_F, self._retrieved[sequence])
            return selected

        return ScoresAllToAll(ColumnsAllToAll(self._group, columns), merge)


def merged(count_ST: Tensor, score_F: Tensor, index_F: Tensor, k: int) -> Selection:
    """Merge the best of all shards into the K best of each target; of equal scores the earlier behaviour wins.

    It is exact if each shard has selected its own K best: the best K of a union are among the best K of its parts.

    Args:
        count_ST: int64, how many each shard has selected for each target.
        score_F: float32.
        index_F: int64, below 2^32.
        k: K.
    """
    S, T = count_ST.shape
    count_T = count_ST.sum(0)
    longest = max(k, int(count_T.max()) if T else 0)
    # Laid out as (T, L), a behaviour's column is how many of its target come before it: those of earlier shards, and
    # those of its own shard that are better.
    flat_ST = count_ST.flatten()
    before_F = (count_ST.cumsum(0) - count_ST).flatten() - (flat_ST.cumsum(0) - flat_ST)
    column_F = torch.arange(len(score_F), device=score_F.device) + before_F.repeat_interleave(flat_ST)
    target_F = torch.arange(T, device=score_F.device).repeat(S).repeat_interleave(flat_ST)
    # Keys order by score and then by index, as in the kernels, so the result does not depend on the number of shards.
    key_TL = torch.full((T, longest), NOTHING, device=score_F.device)
    key_TL[target_F, column_F] = ordered(score_F, index_F)
    key_TK = key_TL.topk(k, dim=1).values
    valid_TK = key_TK != NOTHING
    # A key's lower half is 0xFFFFFFFF less the index, so that the earlier behaviour has the larger key.
    return Selection(torch.where(valid_TK, 0xFFFFFFFF - (key_TK & 0xFFFFFFFF), 0), valid_TK)


class SearchHandle:
    """A search of one batch on the shards that has started: the batch's ids are on their way.

    The rows that the score is made of are read when `finish` is called, so that other work can be done in between.
    Every rank must start and must finish its searches in the same order as the others.

    Args:
        top_k: the search.
        batch: the targets and their histories, on the device of the tables.
        stream: of a GPU, to send the ids on; it must have waited for the batch. None: the current stream, or a CPU.
    """

    def __init__(self, top_k: ShardedTopK, batch: Batch, stream: torch.cuda.Stream | None = None) -> None:
        self.batch, self._top_k, self._stream = batch, top_k, stream
        self._context = top_k.create_context()
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            # Waiting here for sizes starts the exchange of ids; that one is waited for in `finish`.
            self._input = top_k.input_dist(self._context, batch).wait()

    def finish(self, target_cross: CrossRows, history_cross: CrossRows) -> dict[str, Selection]:
        """Wait for the ids, search on the shards, and return the K best behaviours of each target, by sequence.

        Args:
            target_cross: by sequence, all rows of the targets' cross tables.
            history_cross: by sequence, all rows of the behaviours' cross tables.
        """
        # Only now, because they are weights: while the ids travelled, the optimizers may have changed them.
        self._context.target_cross, self._context.history_cross = target_cross, history_cross
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            shard_input = self._input.wait()
        if self._stream is not None:
            # The tensors were made on the other stream: the allocator must not reuse them while this one reads them.
            current = torch.cuda.current_stream()
            current.wait_stream(self._stream)
            self._context.record_stream(current)
            shard_input.record_stream(current)
        # Three steps by hand and not `ShardedTopK.forward`, which would do all of them at once.
        best = self._top_k.compute(self._context, shard_input)
        selected: dict[str, Selection] = self._top_k.output_dist(self._context, best).wait()
        return selected
