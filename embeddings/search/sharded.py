"""Search where the rows live: behaviours' ids go to the shards of the item table, the K best of each shard come back.

`SearchHandle` is a search of one batch, from its start to its result; `ShardedTopK` is the `ShardedModule` behind it,
whose steps are TorchRec's: input_dist, compute, output_dist.

T = targets of this rank, G = targets of all ranks, S = shards (one a rank), K = kept, F = behaviours that all shards
have selected for this rank: shard 0 for the first target, for the second, ..., then shard 1, ..., L = most of them for
a target, D = dim of the inherent features together, C = values of a feature that a shard has met, R = all of them, d =
their dim, X = figures of a rank, M = behaviours of this rank.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import Awaitable, LazyAwaitable, QuantizedCommCodecs, ShardedModule
from torchrec.streamable import Multistreamable

from embeddings.batch import Bags, Batch, Selection
from embeddings.distributed.collectives import Column, ColumnsAllToAll, codecs_of, narrowest
from embeddings.distributed.row_wise import row_wise_tables
from embeddings.layers.scoring import DotProduct
from embeddings.search.messages import LocalWindows, SearchMessages, SearchSizes, ShardInput
from embeddings.search.score_parts import behavior_tables, of_bags, score_parts, search_rows
from embeddings.search.topk.api import top_k
from embeddings.search.topk.inputs import NOTHING, TopKInputs, ordered
from embeddings.sizes import DataSizes, FeatureSides, check_extremes, extremes
from embeddings.tables.collections import CrossRows
from schemas.model import Feature


class SearchChannel(NamedTuple):
    """Where what a search sends ahead travels, so that it does not queue behind the step that is still running."""

    group: dist.ProcessGroup
    """A process group of its own: one group's collectives are one queue."""
    stream: torch.cuda.Stream | None
    """On a GPU, a stream that has waited for the batch."""


@dataclass(frozen=True)
class ShardBest:
    """The K best of a sequence's behaviours on a shard."""

    score_GK: Tensor
    """float32"""
    index_GK: Tensor
    """int64, counted in the shard's behaviours; -1 where there are fewer than K."""
    start_G: Tensor
    """int64, where the windows begin."""
    count_G: Tensor
    """int64, how many there are."""


class SmallAttentionRows(NamedTuple):
    """All rows of attention's small tables, as they are when the shards search."""

    target_cross: CrossRows
    """By sequence, those of the targets' cross tables."""
    history_cross: CrossRows
    """By sequence, those of the behaviours' cross tables."""
    target_inherent: Mapping[Feature, Tensor]
    """Those of the targets' small inherent tables."""
    history_inherent: Mapping[Feature, Tensor]
    """Those of the behaviours' small inherent tables."""


@dataclass
class TopKContext(Multistreamable):
    """What the sample's rank remembers of a search between its steps."""

    windows: dict[str, LocalWindows] = field(default_factory=dict)
    """By sequence; empty where one rank has all rows."""
    sizes: SearchSizes | None = None
    """None where one rank has all rows."""
    small: SmallAttentionRows | None = None
    """Given before `compute`."""
    bags: Mapping[Feature, Bags] = field(default_factory=dict)
    """Those of the data set, for features with several values that the score is made of."""

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that ``stream`` uses the tensors."""
        for windows in self.windows.values():
            windows.record_stream(stream)
        if self.sizes is not None:
            for tensor in (self.sizes.targets_S, *self.sizes.behaviors_S.values()):
                tensor.record_stream(stream)


class RecordsAllToAll(Awaitable[ShardInput]):
    """Targets, behaviours and windows on their way to the shards."""

    def __init__(self, messages: SearchMessages, sizes: SearchSizes, all_to_all: ColumnsAllToAll) -> None:
        super().__init__()
        self._messages, self._sizes, self._all_to_all = messages, sizes, all_to_all

    def _wait_impl(self) -> ShardInput:
        records, sequences = self._all_to_all.wait(), list(self._sizes.sent)
        targets, behaviors = records[: len(sequences)], records[len(sequences) :]
        by_sequence = dict(zip(sequences, targets, strict=True)), dict(zip(sequences, behaviors, strict=True))
        return self._messages.unpack(*by_sequence, self._sizes)


class Here(Awaitable[ShardInput]):
    """The input of a shard that has all rows, for which nothing needs to travel."""

    def __init__(self, shard_input: ShardInput) -> None:
        super().__init__()
        self._shard_input = shard_input

    def _wait_impl(self) -> ShardInput:
        return self._shard_input


class AnswersAllToAll(LazyAwaitable[dict[str, Selection]]):
    """The output: scores and indices on their way back to the samples' ranks, where they are merged."""

    def __init__(self, top_k: "ShardedTopK", ctx: TopKContext, best: Mapping[str, ShardBest]) -> None:
        super().__init__()
        self._top_k, self._ctx, self._best = top_k, ctx, best
        self._all_to_all = None if ctx.sizes is None else top_k.send_answers(ctx.sizes, best)

    def _wait_impl(self) -> dict[str, Selection]:
        if self._all_to_all is None:
            return {sequence: _alone(best) for sequence, best in self._best.items()}
        return self._top_k.merge_answers(self._ctx, self._all_to_all.wait())


class ShardedTopK(ShardedModule[ShardInput, dict[str, ShardBest], dict[str, Selection], TopKContext]):
    """The K best behaviours of each target in each sequence, by a score that is a dot product of rows. No gradient.

    It has no parameters of its own: it reads those of sharded collections whose tables are row-wise.

    - input_dist: a user's behaviours travel once, whatever the number of the user's targets, to the shards of their
      items: row, category, index, ..., and each target's window in them;
    - compute: the shards send each other the targets' item rows; then each keeps the K best of its own behaviours for
      each target of all ranks;
    - output_dist: at most K scores and indices a target and shard travel back, and are merged into K.

    One rank has all rows, and nothing travels.

    Args:
        targets: the sharded collection that targets are looked up in.
        history: the one that behaviours are looked up in, often the same.
        scoring: the score.
        retrieved: K by sequence.
        sizes: of the data, with the batch's bags.
        sides: the features, of which the score is made of the scored ones.
        codecs: of the scores on their way; None: as they are.
    """

    def __init__(
        self,
        targets: ShardedEmbeddingBagCollection,
        history: ShardedEmbeddingBagCollection,
        scoring: DotProduct,
        retrieved: Mapping[str, int],
        sizes: DataSizes,
        sides: FeatureSides,
        codecs: QuantizedCommCodecs | None = None,
    ) -> None:
        super().__init__()
        self._codec = (codecs or codecs_of("fp32")).forward
        inherent, cross = sides.inherent_of(scored=True), sides.cross_of(scored=True)
        self._target_tables, self._history_tables = (
            {feature: tables[feature] for feature in inherent} for tables in map(row_wise_tables, (targets, history))
        )
        self._scoring, self._retrieved, self._sizes = scoring, dict(retrieved), sizes
        self._of_bags = sides.bags.intersection((*inherent, *cross))
        # The item table is by far the largest, so it decides where a behaviour goes; all else travels there.
        self._item = self._history_tables["item"]
        self._group = self._item.group
        self._messages = SearchMessages(inherent, cross, self._item.block, sizes)

    @property
    def unsharded_module_type(self) -> type[EmbeddingBagCollection]:
        """The module whose tables it reads, before sharding."""
        unsharded: type[EmbeddingBagCollection] = EmbeddingBagCollection
        return unsharded

    def create_context(self) -> TopKContext:
        """A context for one search."""
        return TopKContext()

    @torch.no_grad()
    def input_dist(
        self, ctx: TopKContext, batch: Batch, group: dist.ProcessGroup | None = None
    ) -> RecordsAllToAll | Here:
        """Check the batch of each rank, and send its targets and histories to the shards.

        Args:
            ctx: a new one for this search.
            batch: of this rank.
            group: the ranks once more, for what is sent here; None: the tables' group.

        Raises:
            UserError: the batch, or that of another rank, is not within the tables or has windows longer than N.
        """
        group = group or self._group
        # The same on all ranks, which read one data set.
        ctx.bags = {feature: batch.bags[feature] for feature in self._of_bags}
        extremes_X = extremes(batch, self._sizes)
        if group.size() == 1:
            check_extremes(extremes_X.tolist(), batch.origin, self._sizes)
            return Here(self._messages.alone(batch))
        earliest, span = self._messages.times(batch)
        target_S = self._target_tables["item"].bucketed(batch.item_T).count_S.long()
        counts = [target_S]
        for sequence, k in self._retrieved.items():
            history = batch.histories[sequence]
            windows = LocalWindows.of(history, self._item.bucketed(history.item_M))
            ctx.windows[sequence] = windows
            # How much each shard will send back is known already: all of a window that it has, up to K.
            counts += [windows.behaviors.count_S.long(), windows.length_ST.clamp(max=k).sum(1)]
        sent_SX = torch.stack(counts, dim=1)
        received_SX = torch.empty_like(sent_SX)
        dist.all_to_all_single(received_SX, sent_SX, group=group)
        # A shard needs the number of targets of every rank, the longest span, and how many rows the others will send.
        own_X = torch.cat([torch.stack([span, received_SX[:, 0].sum()]), span.new_full((1,), len(batch)), extremes_X])
        all_SX = own_X.new_empty(group.size() * len(own_X))
        dist.all_gather_into_tensor(all_SX, own_X, group=group)
        all_SX = all_SX.view(group.size(), len(own_X))
        # The one moment in which the host waits for a GPU: all figures at once.
        figures = torch.cat([sent_SX, received_SX, all_SX], dim=1)
        ctx.sizes = sizes = self._known_sizes(figures.T.tolist(), batch, all_SX[:, 2].contiguous(), received_SX)
        columns: list[Column] = []
        for sequence, windows in ctx.windows.items():
            record_Xw = self._messages.pack_targets(sequence, batch, windows, earliest, sizes.span)
            columns.append(Column(record_Xw, [len(batch)] * group.size(), sizes.targets))
        for sequence, windows in ctx.windows.items():
            record_Mw = self._messages.pack_behaviors(sequence, batch, windows, earliest, sizes.span)
            columns.append(Column(record_Mw, sizes.sent[sequence], sizes.behaviors[sequence]))
        return RecordsAllToAll(self._messages, sizes, ColumnsAllToAll(group, columns))

    def _known_sizes(
        self, figures: list[list[int]], batch: Batch, targets_S: Tensor, received_SX: Tensor
    ) -> SearchSizes:
        """What all ranks have said of themselves, taken apart; columns by figure, with a number of each rank."""
        width = received_SX.shape[1]
        sent, received, own = figures[:width], figures[width : 2 * width], figures[2 * width :]
        span, held, targets, *limits = own
        for rank, of_rank in enumerate(zip(*limits, strict=True)):
            origin = batch.origin if rank == self._group.rank() else f"the batch of rank {rank}"
            check_extremes(list(of_rank), origin, self._sizes)
        # After the targets' rows: for each sequence, behaviours and answers.
        numbers = {sequence: 1 + 2 * number for number, sequence in enumerate(self._retrieved)}
        return SearchSizes(
            targets=targets,
            held=held,
            sent={sequence: sent[number] for sequence, number in numbers.items()},
            behaviors={sequence: received[number] for sequence, number in numbers.items()},
            answers={sequence: (sent[number + 1], received[number + 1]) for sequence, number in numbers.items()},
            span=max(span),
            targets_S=targets_S,
            behaviors_S={sequence: received_SX[:, number] for sequence, number in numbers.items()},
        )

    @torch.no_grad()
    def compute(self, ctx: TopKContext, dist_input: ShardInput) -> dict[str, ShardBest]:
        """Find the K best of this shard, by sequence; the context must have the rows of the small tables."""
        assert ctx.small is not None
        targets, small, bags = dist_input.targets, ctx.small, ctx.bags
        # Rows of the targets first, on all shards alike. They are read here and not in `input_dist`, so that they are
        # those of this step even where the ids were sent ahead.
        rows = {}
        for feature, table in self._target_tables.items():
            id_G, of_small = targets.columns[feature], small.target_inherent.get(feature)
            distinct = bags[feature].distinct(id_G) if feature in bags else None
            asked = id_G if distinct is None else distinct.id_E
            held = ctx.sizes.held if ctx.sizes is not None and feature == "item" else None
            found = table.gather(asked, held).float() if of_small is None else of_small.index_select(0, asked)
            rows[feature] = found
            if distinct is not None:
                every_E = torch.arange(len(found), device=found.device)
                rows[feature] = distinct.means(found, every_E).index_select(0, distinct.slot_X)
        target_GD = torch.cat(list(rows.values()), dim=1)
        # A fetch is a collective: it comes once for all sequences, outside of the loop, and in the same place on all
        # ranks.
        columns = {
            sequence: {feature: rows.column_M for feature, rows in history.pairs.items()}
            for sequence, history in dist_input.histories.items()
        }
        tables, found_by = behavior_tables(self._history_tables, small.history_inherent, columns, bags)
        best = {}
        for sequence, history in dist_input.histories.items():
            k, scored = self._retrieved[sequence], self._messages.features
            cross, target_cross = (
                {feature: of[sequence][feature] for feature in scored if feature in of[sequence]}
                for of in (small.history_cross, small.target_cross)
            )
            query = self._scoring.queries(search_rows(target_GD, targets.row, target_cross, bags))
            # Rows of the inherent features of behaviours are in different places.
            queries = query.by_feature({feature: rows_Gd.shape[1] for feature, rows_Gd in rows.items()})
            pairs = {**history.pairs, **found_by[sequence]}
            for feature in cross.keys() & bags.keys():
                column_M = pairs[feature].column_M
                assert column_M is not None
                cross[feature], pairs[feature] = of_bags(bags[feature], column_M, cross[feature])
            # The item part is the large one, and is made from rows that do not leave this shard.
            score_GK, index_GK = top_k(
                TopKInputs(
                    rows_RD=self._item.local_Rd,
                    ids_M=history.item_M,
                    start_T=history.start_G,
                    end_T=history.end_G,
                    query_TD=queries["item"].contiguous(),
                    k=k,
                    parts=score_parts(queries, {**tables, **cross}, pairs),
                    longest=self._sizes.lengths[sequence],
                )
            )
            count_G = (history.end_G - history.start_G).clamp(max=k)
            best[sequence] = ShardBest(score_GK, index_GK, history.start_G, count_G)
        return best

    @torch.no_grad()
    def output_dist(self, ctx: TopKContext, output: dict[str, ShardBest]) -> AnswersAllToAll:
        """Send the best of this shard back to the samples' ranks, and merge what comes back to this one."""
        return AnswersAllToAll(self, ctx, output)

    def send_answers(self, sizes: SearchSizes, output: Mapping[str, ShardBest]) -> ColumnsAllToAll:
        """Send scores and indices, each sequence's a column of its own."""
        columns = []
        for sequence, best in output.items():
            received, sent = sizes.answers[sequence]
            # Only what is there travels. The best come first, so the rest of a row of K is filling. How many there are
            # is known, so nobody has to be asked which they are.
            target_F = torch.arange(len(best.count_G), device=best.count_G.device)
            target_F = target_F.repeat_interleave(best.count_G, output_size=sum(sent))
            first_G = best.count_G.cumsum(0) - best.count_G
            column_F = torch.arange(sum(sent), device=target_F.device) - first_G.index_select(0, target_F)
            flat_F = target_F * self._retrieved[sequence] + column_F
            scores_F = self._codec.encode(best.score_GK.flatten().index_select(0, flat_F))
            # Counted from the window's start, as the sample's rank does.
            index_F = best.index_GK.flatten().index_select(0, flat_F) - best.start_G.index_select(0, target_F)
            index_F = index_F.to(narrowest(self._sizes.lengths[sequence] - 1))
            columns += [Column(scores_F, sent, received), Column(index_F, sent, received)]
        return ColumnsAllToAll(self._group, columns)

    def merge_answers(self, ctx: TopKContext, columns: list[Tensor]) -> dict[str, Selection]:
        """Merge what the shards have sent for this rank's targets."""
        selected, rest = {}, iter(columns)
        for sequence, k in self._retrieved.items():
            windows = ctx.windows[sequence]
            count_ST, score_F = windows.length_ST.clamp(max=k), self._codec.decode(next(rest))
            index_F = windows.index_of(count_ST, next(rest))
            # A target has no more than K of each shard, and no more than its window.
            longest = min(k * self._group.size(), self._sizes.lengths[sequence])
            selected[sequence] = merged(count_ST, score_F, index_F, k, longest)
        return selected


def _alone(best: ShardBest) -> Selection:
    """What the only shard has selected, whose indices are those of the batch."""
    valid_TK = best.index_GK >= 0
    return Selection(torch.where(valid_TK, best.index_GK, 0), valid_TK)


def merged(count_ST: Tensor, score_F: Tensor, index_F: Tensor, k: int, longest: int) -> Selection:
    """Merge the best of all shards into the K best of each target; of equal scores the earlier behaviour wins.

    It is exact if each shard has selected its own K best: the best K of a union are among the best K of its parts.

    Args:
        count_ST: int64, how many each shard has selected for each target.
        score_F: float32.
        index_F: int64, below 2^32.
        k: K.
        longest: no target has more of them (L).
    """
    S, T = count_ST.shape
    # Laid out as (T, L), a behaviour's column is how many of its target come before it: those of earlier shards, and
    # those of its own shard that are better.
    flat_ST = count_ST.flatten()
    before_F = (count_ST.cumsum(0) - count_ST).flatten() - (flat_ST.cumsum(0) - flat_ST)
    target_F = torch.arange(S * T, device=score_F.device).repeat_interleave(flat_ST, output_size=len(score_F))
    column_F = torch.arange(len(score_F), device=score_F.device) + before_F.index_select(0, target_F)
    # Keys order by score and then by index, as in the kernels, so the result does not depend on the number of shards.
    longest = max(k, longest)
    key_X = torch.full((T * longest,), NOTHING, device=score_F.device)
    key_X.index_copy_(0, target_F.remainder(max(T, 1)) * longest + column_F, ordered(score_F, index_F))
    key_TK = key_X.view(T, longest).topk(k, dim=1).values
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
        channel: what the ids travel on; None: the tables' group and the current stream.

    Raises:
        UserError: a rank's batch is not within the tables or has windows longer than N.
    """

    def __init__(self, top_k: ShardedTopK, batch: Batch, channel: SearchChannel | None = None) -> None:
        self.batch, self._top_k = batch, top_k
        self._stream = channel.stream if channel else None
        self._context = top_k.create_context()
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            self._input = top_k.input_dist(self._context, batch, channel.group if channel else None)

    def finish(self, small: SmallAttentionRows) -> dict[str, Selection]:
        """Wait for the ids, search on the shards, and return the K best behaviours of each target, by sequence.

        Args:
            small: all rows of attention's small tables.
        """
        # Only now, because they are weights: while the ids travelled, the optimizers may have changed them.
        self._context.small = small
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
