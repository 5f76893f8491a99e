"""Search where the rows live: behaviours' ids go to the shards of the item table, the K best of each shard come back.

T = targets of this rank, G = targets of all ranks, S = shards (one a rank), W = (target, behaviour) pairs, K = kept,
F = found by all shards for this rank, D = dim of the item and category tables together, C = categories met, R = all
categories, d = their dim.

The K best of what several shards have found.

T = targets, S = shards, F = found: of shard 0 for the first target, for the second, ..., then of shard 1, ...,
K = kept, C = most that was found for a target.

A search on the shards whose input is on its way, so that other work is done meanwhile.
"""

from collections.abc import Callable, Mapping
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
from embeddings.search.messages import LocalWindows, SearchRequest, ShardHistory, ShardTargets
from embeddings.search.pairs import Pairs, cross_score, search_rows, small_table_score
from embeddings.search.topk.api import top_k
from embeddings.search.topk.inputs import TopKInputs
from embeddings.search.topk.keys import NOTHING, ordered
from embeddings.tables.collections import CrossRows
from schemas.model import Feature


@dataclass(frozen=True)
class ShardInput:
    """All that a shard is asked."""

    targets: ShardTargets
    histories: Mapping[str, ShardHistory]

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that ``stream`` uses the tensors."""
        for history in self.histories.values():
            for tensor in (*history.columns.values(), history.start_G, history.end_G, history.place_G):
                tensor.record_stream(stream)
        for tensor in self.targets.columns.values():
            tensor.record_stream(stream)


@dataclass(frozen=True)
class ShardBest:
    """The K best of a sequence's behaviours on a shard."""

    score_GK: Tensor
    """float32"""
    place_GK: Tensor
    """int64, counted in the part of the window that is on the shard; negative: none."""
    count_G: Tensor
    """int64, how many there are."""


@dataclass
class TopKContext(Multistreamable):
    """What home remembers of a search."""

    windows: dict[str, LocalWindows] = field(default_factory=dict)
    targets: list[int] = field(default_factory=list)
    """Of each rank."""
    target_cross: CrossRows = field(default_factory=dict)
    """By sequence, all rows of the targets' cross tables, as they are when the search is made."""
    history_cross: CrossRows = field(default_factory=dict)
    """The same of the behaviours'."""

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that ``stream`` uses the tensors."""
        for windows in self.windows.values():
            for tensor in vars(windows).values():
                tensor.record_stream(stream)


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
    """The output: scores and places on their way home, where they are merged."""

    def __init__(self, columns: ColumnsAllToAll, merge: Callable[[list[Tensor]], dict[str, Selection]]) -> None:
        super().__init__()
        self._columns, self._merge = columns, merge

    def _wait_impl(self) -> dict[str, Selection]:
        return self._merge(self._columns.wait())


class ShardedTopK(ShardedModule[ShardInput, dict[str, ShardBest], dict[str, Selection], TopKContext]):
    """The K best behaviours of each target in each sequence, by a score that is a dot product of rows. No gradient.

    It has no parameters of its own: it reads those of sharded collections whose tables are row-wise.

    - input_dist: a user's behaviours travel once, whatever the number of the user's targets, to the shards of their
      items: row, category, place, ..., and each target's window in them;
    - compute: the shards send each other the targets' item rows, and fetch the rows of the categories that they were
      sent; then each keeps the K best of its own behaviours for each target of all ranks;
    - output_dist: at most K scores and places a target and shard travel home, where they are merged into K.

    Args:
        targets: sharded tables that targets are looked up in.
        history: those that behaviours are looked up in, often the same.
        scoring: the score.
        retrieved: K by sequence.
        lengths: N by sequence.
        cross: the cross features, and how many rows their tables have.
        codecs: of the scores on their way home; None: as they are.
    """

    def __init__(
        self,
        targets: ShardedEmbeddingBagCollection,
        history: ShardedEmbeddingBagCollection,
        scoring: DotProduct,
        retrieved: Mapping[str, int],
        lengths: Mapping[str, int],
        cross: Mapping[Feature, int],
        codecs: QuantizedCommCodecs | None = None,
    ) -> None:
        super().__init__()
        self._codec = (codecs or codecs_of("fp32")).forward
        self._target_tables, history_tables = row_wise_tables(targets), row_wise_tables(history)
        self._scoring, self._retrieved, self._lengths = scoring, dict(retrieved), dict(lengths)
        self._item, self._category = history_tables["item"], history_tables.get("category")
        self._group = self._item.group
        rows = {**cross, "item": self._item.block}
        if self._category:
            rows["category"] = self._category.rows
        self._request = SearchRequest((*history_tables, *cross), rows, self._item.rows, lengths)

    @property
    def unsharded_module_type(self) -> type[EmbeddingBagCollection]:
        """What it reads, before sharding."""
        return EmbeddingBagCollection

    def create_context(self) -> TopKContext:
        """Of one search."""
        return TopKContext()

    @torch.no_grad()
    def input_dist(self, ctx: TopKContext, batch: Batch) -> SizesAllGather:
        """Send the targets and histories of this rank to the shards."""
        buckets = {name: self._item.bucketed(batch.histories[name].item_M) for name in self._retrieved}
        ctx.windows = {name: LocalWindows.of(batch.histories[name], bucket) for name, bucket in buckets.items()}
        earliest, span = self._request.times(batch)
        counts = [count for bucket in buckets.values() for count in bucket.counts]

        def send(sizes: Tensor) -> BehaviorsAllToAll:
            ranks = self._group.size()
            by_rank = sizes.view(ranks, -1)
            ctx.targets = by_rank[:, 0].tolist()
            longest_span = int(by_rank[:, 1].max())
            to_here = by_rank[:, 2:].view(ranks, len(buckets), ranks)[:, :, self._group.rank()].T.tolist()
            columns = self._request.target_columns(batch, earliest, ctx.targets)
            for (name, bucket), behaviors in zip(buckets.items(), to_here, strict=True):
                columns += self._request.history_columns(
                    name, batch, bucket, ctx.windows[name], earliest, longest_span, behaviors, ctx.targets
                )
            return BehaviorsAllToAll(ColumnsAllToAll(self._group, columns), lambda found: unpack(found, to_here))

        def unpack(found: list[Tensor], to_here: list[list[int]]) -> ShardInput:
            columns = iter(found)
            targets = self._request.targets(columns, ctx.targets)
            return ShardInput(
                targets,
                {
                    name: self._request.history(columns, behaviors, targets)
                    for name, behaviors in zip(buckets, to_here, strict=True)
                },
            )

        sizes = torch.tensor([len(batch), span, *counts], device=batch.item_T.device)
        return SizesAllGather(self._group, sizes, send)

    @torch.no_grad()
    def compute(self, ctx: TopKContext, dist_input: ShardInput) -> dict[str, ShardBest]:
        """The K best of this shard, by sequence; the context must have the rows of the cross tables."""
        targets = dist_input.targets
        rows = [table.gather(targets.columns[feature]).float() for feature, table in self._target_tables.items()]
        target_GD = torch.cat(rows, dim=1)
        categories = self._categories(dist_input.histories)
        found = {}
        for name, history in dist_input.histories.items():
            query = self._scoring.queries(search_rows(target_GD, targets.row, ctx.target_cross[name]))
            dims = [part.shape[1] for part in rows]
            inherent = dict(zip(self._target_tables, query.inherent.split(dims, dim=1), strict=True))
            pairs = Pairs(history.start_G, history.end_G, len(history.columns["item"]))
            row = partial(history.row, targets=targets, pairs=pairs)
            additive_W = cross_score(pairs, query.cross, row, ctx.history_cross[name])
            if categories:
                rows_Cd, slot_R = categories
                slot_W = pairs.of_behaviors(slot_R.index_select(0, history.columns["category"].to(torch.int32)))
                additive_W += small_table_score(pairs, inherent["category"], rows_Cd, slot_W)
            score_GK, index_GK = top_k(
                TopKInputs(
                    rows_RD=self._item.local_Rd,
                    ids_M=history.columns["item"].to(torch.int32),
                    start_T=history.start_G,
                    end_T=history.end_G,
                    query_TD=inherent["item"].contiguous(),
                    additive_W=additive_W,
                    k=self._retrieved[name],
                )
            )
            length_G = history.end_G - history.start_G
            found[name] = ShardBest(
                score_GK, index_GK - history.start_G[:, None], length_G.clamp(max=self._retrieved[name])
            )
        return found

    def _categories(self, histories: Mapping[str, ShardHistory]) -> tuple[Tensor, Tensor] | None:
        """Rows of the categories that were met here, float32, and where among them each category's is."""
        if self._category is None:
            return None
        met_R = torch.zeros(self._category.rows, dtype=torch.bool, device=self._item.local_Rd.device)
        for history in histories.values():
            met_R[history.columns["category"].long()] = True
        return self._category.fetch(met_R.nonzero().flatten()).float(), met_R.cumsum(0) - 1

    @torch.no_grad()
    def output_dist(self, ctx: TopKContext, output: dict[str, ShardBest]) -> ScoresAllToAll:
        """Send what was found home and merge it."""
        columns, founds = [], {}
        for name, best in output.items():
            k = self._retrieved[name]
            windows = ctx.windows[name]
            founds[name] = (windows.end_ST - windows.start_ST).clamp(max=k)
            sent = [int(part.sum()) for part in best.count_G.split(ctx.targets)]
            received = founds[name].sum(1).tolist()
            is_there_GK = torch.arange(k, device=best.count_G.device) < best.count_G[:, None]
            places = best.place_GK[is_there_GK].to(narrowest(self._lengths[name] - 1))
            scores = self._codec.encode(best.score_GK[is_there_GK])
            columns += [Column(scores, sent, received), Column(places, sent, received)]

        def merge(columns: list[Tensor]) -> dict[str, Selection]:
            selected = {}
            for place, (name, found_ST) in enumerate(founds.items()):
                score_F, place_F = columns[2 * place : 2 * place + 2]
                windows = ctx.windows[name]
                first_F = windows.start_ST.flatten().repeat_interleave(found_ST.flatten())
                index_F = windows.place_M.index_select(0, first_F + place_F.long()).long()
                selected[name] = merged(found_ST, self._codec.decode(score_F), index_F, self._retrieved[name])
            return selected

        return ScoresAllToAll(ColumnsAllToAll(self._group, columns), merge)


def merged(count_ST: Tensor, score_F: Tensor, index_F: Tensor, k: int) -> Selection:
    """The K best of each target; of equal scores the earlier behaviour wins.

    Exact, if each shard found its own K best: the best K of a union are among the best K of its parts.

    Args:
        count_ST: int64, how many each shard found for each target.
        score_F: float32.
        index_F: int64, below 2^32.
        k: K.
    """
    S, T = count_ST.shape
    count_T = count_ST.sum(0)
    longest = max(k, int(count_T.max()) if T else 0)
    flat_ST = count_ST.flatten()
    before_F = (count_ST.cumsum(0) - count_ST).flatten() - (flat_ST.cumsum(0) - flat_ST)
    column_F = torch.arange(len(score_F), device=score_F.device) + before_F.repeat_interleave(flat_ST)
    target_F = torch.arange(T, device=score_F.device).repeat(S).repeat_interleave(flat_ST)
    key_TC = torch.full((T, longest), NOTHING, device=score_F.device)
    key_TC[target_F, column_F] = ordered(score_F, index_F)
    key_TK = key_TC.topk(k, dim=1).values
    valid_TK = key_TK != NOTHING
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
            self._input = top_k.input_dist(self._context, batch).wait()

    def finish(self, target_cross: CrossRows, history_cross: CrossRows) -> dict[str, Selection]:
        """Wait for the ids, search on the shards, and return the K best behaviours of each target, by sequence.

        Args:
            target_cross: by sequence, all rows of the targets' cross tables.
            history_cross: by sequence, all rows of the behaviours' cross tables.
        """
        self._context.target_cross, self._context.history_cross = target_cross, history_cross
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            asked = self._input.wait()
        if self._stream is not None:
            here = torch.cuda.current_stream()
            here.wait_stream(self._stream)
            self._context.record_stream(here)
            asked.record_stream(here)
        best = self._top_k.compute(self._context, asked)
        selected: dict[str, Selection] = self._top_k.output_dist(self._context, best).wait()
        return selected
