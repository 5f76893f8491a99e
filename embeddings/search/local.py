"""Search on the sample's rank ("local"): the rows of all behaviours travel to it, and it keeps the K best of them.

A model searches so where its settings say `search: local`, and where its score cannot be made on the shards: there a
behaviour's item and category rows lie apart, so that only a dot product, which is a sum over the parts, can be scored.

T = targets, K = behaviours to keep of each, M = behaviours of all users, W = (target, behaviour) pairs: all behaviours
of the first target's window, then of the second's, ..., N = longest window, C = targets of a chunk, D = dim of the
inherent features together, d = dim of one feature, B = bits of a signature.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import embedding

from embeddings.batch import Batch, History, Selection, gather_or_zeros
from embeddings.features import Rows, behavior_row, target_row
from embeddings.layers.projections import Signature
from embeddings.layers.scoring import DotProduct
from embeddings.search.pairs import Pairs, cross_score, search_rows
from embeddings.search.topk.api import top_k
from embeddings.search.topk.inputs import TopKInputs
from embeddings.tables.collections import AllCrossRows, CrossRows, Tables
from schemas.model import Feature

CHUNK_PAIRS = {"cpu": 1 << 13, "cuda": 1 << 18}
"""How many pairs' rows are in memory at once in `search_by_score`: on a CPU, as many as its caches hold."""

ClusterWeights = Callable[[Tensor, History], Tensor]
"""Takes a sequence's rows (M, D) and its windows. Returns, float32 (W,), the logarithm of how many behaviours each
pair's behaviour stands for; -inf where another behaviour stands for it."""


@dataclass(frozen=True)
class LocalRows:
    """Attention rows of all targets and behaviours of a batch, on the sample's rank and without gradient.

    Each user's behaviours are there once, whatever the number of the user's targets.
    """

    batch: Batch
    target_TD: Tensor
    """float32: item and category rows of the targets."""
    behavior_MD: Mapping[str, Tensor]
    """float32, by sequence: item and category rows of its behaviours."""
    target_cross: CrossRows
    """All rows of the targets' cross tables."""
    history_cross: CrossRows
    """All rows of the behaviours' cross tables."""

    @classmethod
    @torch.no_grad()
    def look_up(cls, batch: Batch, tables: Tables, cross: AllCrossRows, target_set: str, history_set: str) -> Self:
        """Look all rows up; every rank must call it.

        Args:
            batch: the targets and their histories.
            tables: where the rows are.
            cross: by set, all rows of the cross tables.
            target_set: the set of tables that targets are looked up in.
            history_set: the set of tables that behaviours are looked up in.
        """
        # All sequences share the tables, so all their behaviours are one lookup. Equal ids travel once (`ShardedRows`).
        items = [batch.histories[sequence].item_M for sequence in tables.sequences]
        categories = [batch.histories[sequence].category_M for sequence in tables.sequences]

        def rows(set_name: str, item: list[Tensor], category: list[Tensor]) -> Tensor:
            ids: dict[Feature, Tensor] = {"item": torch.cat(item), "category": torch.cat(category)}
            return tables.inherent_rows(set_name, ids, torch.ones_like(ids["item"], dtype=torch.bool))

        counts = [len(item_M) for item_M in items]
        if target_set == history_set:
            # One lookup for both: a rank that asks twice waits for the others twice.
            together = rows(history_set, [*items, batch.item_T], [*categories, batch.category_T])
            *behaviors, target_TD = together.split([*counts, len(batch)])
        else:
            behaviors = list(rows(history_set, items, categories).split(counts))
            target_TD = rows(target_set, [batch.item_T], [batch.category_T])
        behavior_MD = dict(zip(tables.sequences, behaviors, strict=True))
        return cls(batch, target_TD, behavior_MD, cross[target_set], cross[history_set])

    def targets(self, sequence: str) -> Rows:
        """The targets' rows as scores make queries of them, seen from a sequence; see `search_rows`."""
        return search_rows(self.target_TD, partial(target_row, batch=self.batch), self.target_cross[sequence])


@torch.no_grad()
def search_by_dot_product(
    rows: LocalRows, scoring: DotProduct, retrieved: Mapping[str, int], cluster_weights: ClusterWeights | None = None
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
    target_T = torch.arange(len(batch), device=rows.target_TD.device)
    for sequence, k in retrieved.items():
        history, rows_MD = batch.histories[sequence], rows.behavior_MD[sequence]
        queries = scoring.queries(rows.targets(sequence))
        # The rows were brought here behaviour by behaviour, so behaviour m has row m: no ids are left.
        ids_M = torch.arange(len(rows_MD), device=rows_MD.device)
        pairs = Pairs(history.start_T, history.end_T, len(rows_MD))
        index_W, target_W = pairs.of_behaviors(ids_M), pairs.of_targets(target_T)
        row = partial(behavior_row, batch=batch, history=history, index_X=index_W, target_X=target_W)
        # The part of the score that is of small tables comes as one float a pair; the kernel adds it to the product of
        # rows.
        additive_W = cross_score(pairs, queries.cross, row, rows.history_cross[sequence])
        weight_W = None if cluster_weights is None else cluster_weights(rows_MD, history)
        if weight_W is not None:
            additive_W = additive_W + weight_W
        query_TD = queries.inherent.contiguous()
        inputs = TopKInputs(rows_MD, ids_M, history.start_T, history.end_T, query_TD, additive_W, k)
        score_TK, index_TK = top_k(inputs)
        valid_TK, log_count_TK = index_TK >= 0, None
        if weight_W is not None:
            # Behaviours that another one stands for have -inf: they fill up a selection of fewer than K clusters.
            valid_TK &= score_TK != -torch.inf
            pair_TK = pairs.pair_index(torch.where(valid_TK, index_TK, history.start_T[:, None]))
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
    target_T = torch.arange(len(rows.batch), device=device)
    for sequence, k in retrieved.items():
        history, rows_MD = rows.batch.histories[sequence], rows.behavior_MD[sequence]
        targets, window = rows.targets(sequence), Selection.everything(history)
        longest = window.index_TK.shape[1]
        # The score may need many floats for a pair: only the pairs of a few targets are in memory at a time.
        chunk = max(1, CHUNK_PAIRS[device.type] // max(1, longest))
        scores = [rows_MD.new_empty(0)]
        for target_C in target_T.split(chunk) if longest else ():
            index_CN, valid_CN = window.index_TK[target_C], window.valid_TK[target_C]
            # Row 0 for padding (times False): an index of 0 may be a position that the table does not have.
            cross = {
                feature: embedding(
                    behavior_row(feature, rows.batch, history, index_CN, target_C[:, None]) * valid_CN, rows_Rd
                )
                for feature, rows_Rd in rows.history_cross[sequence].items()
            }
            score_CN = scoring(
                targets.map(partial(_of_targets, target_C=target_C)), Rows(embedding(index_CN, rows_MD), cross)
            )
            scores.append(score_CN[valid_CN])
        selected[sequence] = select_best(torch.cat(scores), history, k)
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
    # A table of one row 0, which every behaviour has: so the score is the additive part alone.
    zero = score_W.new_zeros(1, 1)
    ids_M = torch.zeros_like(history.item_M)
    query_TD = zero.expand(len(history.start_T), 1).contiguous()
    score_TK, index_TK = top_k(TopKInputs(zero, ids_M, history.start_T, history.end_T, query_TD, score_W, k))
    valid_TK = (index_TK >= 0) & (score_TK != -torch.inf)
    return Selection(torch.where(valid_TK, index_TK, 0), valid_TK)


@torch.no_grad()
def search_by_signature(rows: LocalRows, signature: Signature, retrieved: Mapping[str, int]) -> dict[str, Selection]:
    """Keep the K behaviours of each target whose signatures have the least Hamming distance (ETA, arXiv 2108.04468).

    Args:
        rows: of all targets and behaviours.
        signature: of their item and category rows.
        retrieved: K by sequence.

    Returns:
        By sequence, the nearest first; of equal distances the earlier behaviour first.
    """
    target_TB, selected = _signs(signature(rows.target_TD)), {}
    for sequence, k in retrieved.items():
        history = rows.batch.histories[sequence]
        # The product of two vectors of B signs is B less twice their distance: the nearest have the largest product.
        sign_MB = _signs(signature(rows.behavior_MD[sequence]))
        ids_M = torch.arange(len(sign_MB), device=sign_MB.device)
        zero_W = sign_MB.new_zeros(int((history.end_T - history.start_T).sum()))
        _, index_TK = top_k(TopKInputs(sign_MB, ids_M, history.start_T, history.end_T, target_TB, zero_W, k))
        selected[sequence] = Selection(index_TK.clamp(min=0), index_TK >= 0)
    return selected


def _signs(bits: Tensor) -> Tensor:
    """1 for a set bit, -1 for another, float32."""
    return torch.where(bits, 1.0, -1.0)
