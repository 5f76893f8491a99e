"""Search on the sample's rank ("local"): the rows of all behaviours travel to it, and it keeps the K best of them.

A model searches so where its settings say `search: local`, and where its score cannot be made on the shards: there a
behaviour's rows of item, category and the like lie apart, so that only a dot product, a sum over parts, can be scored.

T = targets, K = behaviours to keep of each, M = behaviours of all users, W = (target, behaviour) pairs: all behaviours
of the first target's window, then of the second's, ..., N = longest window, C = targets of a chunk, D = dim of the
inherent features together, d = dim of one feature, L = rows looked up, B = bits of a signature.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, Self

import torch
from torch import Tensor
from torch.nn.functional import embedding

from embeddings.batch import Batch, History, Selection, gather_or_zeros
from embeddings.features import IndexedRows, Rows, behavior_row, pooled_bags, target_row
from embeddings.search.score_parts import PairRows, of_bags, pair_rows, score_parts, search_rows
from embeddings.search.topk.api import top_k
from embeddings.search.topk.inputs import PartKind, TopKInputs
from embeddings.sizes import FeatureSides
from schemas.model import Feature

if TYPE_CHECKING:
    # Those who have the rows at hand need no TorchRec.
    from embeddings.tables.collections import CrossRows, SmallRows, Tables

CHUNK_PAIRS = {"cpu": 1 << 13, "cuda": 1 << 18}
"""How many pairs' rows are in memory at once in `search_by_score`: on a CPU, as many as its caches hold."""

ClusterWeights = Callable[[Tensor, History], Tensor]
"""Takes a sequence's item rows (M, d) and its windows. Returns, float32 (W,), the logarithm of how many behaviours each
pair's behaviour stands for; -inf where another behaviour stands for it."""


class Queries(Protocol):
    """A score that is a dot product of rows, as `embeddings.layers.scoring.DotProduct` is."""

    def queries(self, target: Rows) -> Rows:
        """Make the queries that the behaviours' rows are multiplied by, with the dims of those rows."""


@dataclass(frozen=True)
class LocalRows:
    """Attention rows of all targets and behaviours of a batch, on the sample's rank and without gradient.

    Each user's behaviours are there once, whatever the number of the user's targets.
    """

    batch: Batch
    lengths: Mapping[str, int]
    """N by sequence."""
    target_TD: Tensor
    """float32: rows of the targets' inherent features, side by side."""
    behaviors: Mapping[str, Mapping[Feature, IndexedRows]]
    """By sequence and inherent feature: the rows of its behaviours, index (M,)."""
    target_cross: "CrossRows"
    """All rows of the targets' cross tables."""
    history_cross: "CrossRows"
    """All rows of the behaviours' cross tables; of a feature with several values, one for each bag they have."""
    cross_pairs: Mapping[str, Mapping[Feature, PairRows]]
    """By sequence and cross feature: how pairs find their row."""
    sides: FeatureSides
    """The features, by what they belong to."""
    scale_R: Tensor | None = None
    """float32: what each item row is multiplied by where these are int8, which a search by a dot product alone reads;
    None: they are floats."""

    @classmethod
    @torch.no_grad()
    def look_up(
        cls,
        batch: Batch,
        tables: "Tables",
        small: "SmallRows",
        target_set: str,
        history_set: str,
        lengths: Mapping[str, int],
    ) -> Self:
        """Look all rows up; every rank must call it.

        Args:
            batch: the targets and their histories.
            tables: where the rows are.
            small: all rows of the small tables.
            target_set: the set of tables that targets are looked up in.
            history_set: the set of tables that behaviours are looked up in.
            lengths: N by sequence.
        """
        from embeddings.distributed.row_wise import row_wise_tables

        # All sequences share the tables, so all their behaviours are one lookup. Equal ids travel once.
        histories, sides = [batch.histories[sequence] for sequence in tables.sequences], tables.sides

        def rows(set_name: str, parts: Sequence[Batch | History]) -> dict[Feature, IndexedRows]:
            row_wise = tables.row_wise(set_name)
            local = row_wise_tables(tables.inherent[set_name]) if row_wise and tables.ranks(set_name) == 1 else {}
            # Where all rows are on this rank, they are read where they are, if that is on the device.
            in_place = bool(local) and not any(table.cached for table in local.values())
            # A set that is looked up by another collective is looked up whole.
            features = tables.inherent_features(set_name, scored=row_wise)
            ids = {feature: torch.cat([part.column(feature) for part in parts]) for feature in features}
            looked_up: dict[Feature, IndexedRows] = {}
            if not in_place:
                found = tables.inherent_rows(set_name, ids, None, small, batch.bags)
                looked_up = {feature: IndexedRows(*of.pooled()[:2]) for feature, of in found.items()}
            for feature in features if in_place else ():
                table_Rd, id_B = local[feature].local_Rd, ids[feature].long()
                if feature in sides.bags:
                    looked_up[feature] = pooled_bags(batch.bags[feature], id_B, table_Rd.float())
                else:
                    looked_up[feature] = IndexedRows(table_Rd, id_B)
            return {feature: looked_up[feature] for feature in tables.inherent_features(set_name, scored=True)}

        counts = [len(history.item_M) for history in histories]
        if target_set == history_set:
            # One lookup for both: a rank that asks twice waits for the others twice.
            together = rows(history_set, [*histories, batch])
            parts = {feature: of.index_X.split([*counts, len(batch)]) for feature, of in together.items()}
            of_targets = {feature: IndexedRows(of.rows_Ld, parts[feature][-1]) for feature, of in together.items()}
        else:
            together = rows(history_set, histories)
            parts = {feature: of.index_X.split(counts) for feature, of in together.items()}
            of_targets = rows(target_set, [batch])
        behaviors = {
            sequence: {feature: IndexedRows(of.rows_Ld, parts[feature][number]) for feature, of in together.items()}
            for number, sequence in enumerate(tables.sequences)
        }
        target_TD = torch.cat([of.gathered().float() for of in of_targets.values()], dim=1)
        cross = small.cross[target_set], small.cross[history_set]
        return cls.of(batch, lengths, sides, target_TD, behaviors, *cross)

    @classmethod
    def of(
        cls,
        batch: Batch,
        lengths: Mapping[str, int],
        sides: FeatureSides,
        target_TD: Tensor,
        behaviors: Mapping[str, Mapping[Feature, IndexedRows]],
        target_cross: "CrossRows",
        history_cross: "CrossRows",
        scale_R: Tensor | None = None,
    ) -> Self:
        """Take rows that are at hand; arguments as the fields, but ``history_cross`` has rows of ids, not of bags."""
        cross: dict[str, dict[Feature, Tensor]] = {sequence: {} for sequence in behaviors}
        pairs: dict[str, dict[Feature, PairRows]] = {sequence: {} for sequence in behaviors}
        for sequence in behaviors:
            history = batch.histories[sequence]
            for feature in sides.cross_of(scored=True):
                table_Rd, found_by = history_cross[sequence][feature], pair_rows(feature, batch, history)
                if feature in sides.bags:
                    assert found_by.column_M is not None
                    table_Rd, found_by = of_bags(batch.bags[feature], found_by.column_M, table_Rd)
                cross[sequence][feature], pairs[sequence][feature] = table_Rd, found_by
        of_target = {
            sequence: {feature: of[feature] for feature in sides.cross_of(scored=True)}
            for sequence, of in target_cross.items()
        }
        return cls(batch, lengths, target_TD, behaviors, of_target, cross, pairs, sides, scale_R)

    def targets(self, sequence: str) -> Rows:
        """The targets' rows as scores make queries of them, seen from a sequence; see `search_rows`."""
        row = partial(target_row, batch=self.batch, carried=self.sides.carried)
        bags = {feature: self.batch.bags[feature] for feature in self.sides.bags}
        return search_rows(self.target_TD, row, self.target_cross[sequence], bags)

    def cross_rows(self, sequence: str, index_CN: Tensor, target_C: Tensor, valid_CN: Tensor) -> dict[Feature, Tensor]:
        """Rows of some targets' behaviours in the cross features' tables, (C, N, d) each; padding has row 0."""
        batch, rows = self.batch, dict[Feature, Tensor]()
        history = batch.histories[sequence]
        for feature, table_Rd in self.history_cross[sequence].items():
            column_M = self.cross_pairs[sequence][feature].column_M
            if feature in self.sides.bags:
                assert column_M is not None
                row_CN = gather_or_zeros(column_M, index_CN)
            else:
                row_CN = behavior_row(feature, batch, history, index_CN, target_C[:, None])
            # Times False for padding: an index of 0 may be a position that the table does not have.
            rows[feature] = embedding(row_CN * valid_CN, table_Rd)
        return rows

    def gathered(self, sequence: str, index_X: Tensor | None = None) -> Tensor:
        """Inherent features' rows of some behaviours of a sequence, side by side, float32 (X, D); None: of all."""
        parts = [
            embedding(of.index_X if index_X is None else gather_or_zeros(of.index_X, index_X), of.rows_Ld).float()
            for of in self.behaviors[sequence].values()
        ]
        return torch.cat(parts, dim=-1)


@torch.no_grad()
def search_by_dot_product(
    rows: LocalRows, scoring: Queries, retrieved: Mapping[str, int], cluster_weights: ClusterWeights | None = None
) -> dict[str, Selection]:
    """Keep the K best behaviours of each target in each sequence, by a score that is a dot product of rows.

    Args:
        rows: of all targets and behaviours.
        scoring: the score.
        retrieved: K by sequence.
        cluster_weights: is added to the score, and selects one behaviour of each cluster; None: each behaviour stands
            for itself.

    Returns:
        By sequence, the best first.
    """
    batch, selected = rows.batch, {}
    for sequence, k in retrieved.items():
        history, features = batch.histories[sequence], rows.behaviors[sequence]
        queries = scoring.queries(rows.targets(sequence))
        # Rows of the inherent features of behaviours lie apart.
        by_feature = queries.by_feature({feature: of.rows_Ld.shape[1] for feature, of in features.items()})
        tables, pairs = dict(rows.history_cross[sequence]), dict(rows.cross_pairs[sequence])
        for feature, of in features.items():
            if feature != "item":
                tables[feature] = of.rows_Ld.float()
                pairs[feature] = PairRows(PartKind.VALUE, of.index_X.to(torch.int32))
        item = features["item"]
        weight_W = None
        if cluster_weights is not None:
            weight_W = cluster_weights(item.gathered().float(), history)
        inputs = TopKInputs(
            rows_RD=item.rows_Ld,
            ids_M=item.index_X,
            start_T=history.start_T,
            end_T=history.end_T,
            query_TD=by_feature["item"].contiguous(),
            k=k,
            parts=score_parts(by_feature, tables, pairs),
            additive_W=weight_W,
            longest=rows.lengths[sequence],
            scale_R=rows.scale_R,
        )
        score_TK, index_TK = top_k(inputs)
        valid_TK, log_count_TK = index_TK >= 0, None
        if weight_W is not None:
            # Behaviours that another one stands for have -inf: they fill up a selection of fewer than K clusters.
            valid_TK &= score_TK != -torch.inf
            # Which of the W pairs each target is with its selected behaviours; padding reads any.
            pair_TK = inputs.first_pair_T[:, None] + index_TK - history.start_T[:, None]
            pair_TK = torch.where(valid_TK, pair_TK, 0)
            log_count_TK = torch.where(valid_TK, gather_or_zeros(weight_W, pair_TK), 0)
        selected[sequence] = Selection(torch.where(valid_TK, index_TK, 0), valid_TK, log_count_TK)
    return selected


@torch.no_grad()
def search_by_score(
    rows: LocalRows, scoring: Callable[[Rows, Rows], Tensor], retrieved: Mapping[str, int]
) -> dict[str, Selection]:
    """Keep the K best behaviours of each target in each sequence, by any score: each pair is scored on its own.

    Args:
        rows: of all targets and behaviours.
        scoring: takes rows of C targets (C, ...) and of N behaviours of each (C, N, ...), returns scores (C, N).
        retrieved: K by sequence.

    Returns:
        By sequence, the best first.
    """
    selected, device = {}, rows.target_TD.device
    for sequence, k in retrieved.items():
        history, targets = rows.batch.histories[sequence], rows.targets(sequence)
        length_T = history.end_T - history.start_T
        # Both at once: on a GPU the host waits here.
        zero = length_T.new_zeros(1)
        longest, pairs = torch.stack([torch.cat([length_T, zero]).max(), length_T.sum()]).tolist()
        column_N = torch.arange(longest, device=device)
        first_pair_T = length_T.cumsum(0) - length_T
        # Padding is written behind the last pair.
        score_W = rows.target_TD.new_empty(pairs + 1)
        # The score may need many floats for a pair: only the pairs of a few targets are in memory at a time.
        chunk = max(1, CHUNK_PAIRS[device.type] // max(1, longest))
        for target_C in torch.arange(len(rows.batch), device=device).split(chunk) if longest else ():
            valid_CN = column_N < length_T[target_C, None]
            index_CN = torch.where(valid_CN, history.start_T[target_C, None] + column_N, 0)
            cross = rows.cross_rows(sequence, index_CN, target_C, valid_CN)
            score_CN = scoring(
                targets.map(partial(_of_targets, target_C=target_C)), Rows(rows.gathered(sequence, index_CN), cross)
            )
            pair_CN = torch.where(valid_CN, first_pair_T[target_C, None] + column_N, pairs)
            score_W.scatter_(0, pair_CN.flatten(), score_CN.flatten())
        selected[sequence] = select_best(score_W[:pairs], history, k)
    return selected


def _of_targets(rows_Td: Tensor, target_C: Tensor) -> Tensor:
    """The rows of some targets, (C, d); ``rows_Td`` may be one row for all."""
    # With a single target both ways give the same row.
    return rows_Td.expand(len(target_C), -1) if len(rows_Td) == 1 else rows_Td[target_C]


def select_best(score_W: Tensor, history: History, k: int) -> Selection:
    """Keep the K best behaviours of each target's window by scores that are known; those of score -inf never count.

    Args:
        score_W: float32, the score of each pair.
        history: the behaviours and windows.
        k: K.
    """
    # Rows of no dims, so that the score is the additive part alone.
    ids_M = torch.zeros_like(history.item_M)
    rows_RD, query_TD = score_W.new_empty(1, 0), score_W.new_empty(len(history.start_T), 0)
    score_TK, index_TK = top_k(
        TopKInputs(rows_RD, ids_M, history.start_T, history.end_T, query_TD, k, additive_W=score_W)
    )
    valid_TK = (index_TK >= 0) & (score_TK != -torch.inf)
    return Selection(torch.where(valid_TK, index_TK, 0), valid_TK)


@torch.no_grad()
def search_by_signature(
    rows: LocalRows, signature: Callable[[Tensor], Tensor], retrieved: Mapping[str, int]
) -> dict[str, Selection]:
    """Keep the K behaviours of each target whose signatures have the least Hamming distance (ETA, arXiv 2108.04468).

    Args:
        rows: of all targets and behaviours.
        signature: takes inherent features' rows, (X, D), returns bits, (X, B); see
            `embeddings.layers.projections.Signature`.
        retrieved: K by sequence.

    Returns:
        By sequence, the nearest first; of equal distances the earlier behaviour first.
    """
    target_TB, selected = _signs(signature(rows.target_TD)), {}
    for sequence, k in retrieved.items():
        history = rows.batch.histories[sequence]
        # The product of two vectors of B signs is B less twice their distance: the nearest have the largest product.
        sign_MB = _signs(signature(rows.gathered(sequence)))
        ids_M = torch.arange(len(sign_MB), device=sign_MB.device)
        _, index_TK = top_k(
            TopKInputs(sign_MB, ids_M, history.start_T, history.end_T, target_TB, k, longest=rows.lengths[sequence])
        )
        selected[sequence] = Selection(index_TK.clamp(min=0), index_TK >= 0)
    return selected


def _signs(bits: Tensor) -> Tensor:
    """1 for a set bit, -1 for another, float32."""
    return torch.where(bits, 1.0, -1.0)
