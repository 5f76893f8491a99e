"""The attention rows of all targets and behaviours of a batch, locally and without gradient, for searches made there.

M = behaviours of all users, T = targets, D = dim of the inherent features together.

Search locally: the attention rows of all behaviours come to the rank that owns the sample, and it keeps the K best.

M = behaviours of all users, T = targets, W = (target, behaviour) pairs.

Search locally by any score of a target and a behaviour, a dot product or not.

T = targets, N = longest window, M = behaviours of all users, W = (target, behaviour) pairs, C = targets of a chunk.

Signs of random projections: rows that point the same way share many of them (SimHash).

T = targets, M = behaviours of all users, D = dim of the inherent features together, B = bits, X = any shape.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import embedding

from embeddings.batch import Batch, History, Selection, gather_or_zeros
from embeddings.features import Rows, behavior_row, target_row
from embeddings.layers.scoring import DotProduct
from embeddings.layers.simhash import Signature
from embeddings.search.pairs import Pairs, cross_score, search_rows
from embeddings.search.topk.api import top_k
from embeddings.tables.collections import AllCrossRows, CrossRows, Tables
from schemas.model import Feature


@dataclass(frozen=True)
class AllRows:
    """What a search locally sees; each user's behaviours once, whatever the number of the user's targets."""

    batch: Batch
    target_TD: Tensor
    """float32: item and category rows of the targets."""
    behavior_MD: Mapping[str, Tensor]
    """float32, by sequence: the same of the behaviours."""
    target_cross: CrossRows
    """All rows of the targets' cross tables."""
    history_cross: CrossRows
    """All rows of the behaviours'."""

    @classmethod
    @torch.no_grad()
    def look_up(
        cls,
        batch: Batch,
        tables: Tables,
        target_set: str,
        history_set: str,
        cross: AllCrossRows,
        sequences: Sequence[str],
    ) -> Self:
        """Bring them home; every rank must call it.

        Args:
            batch: the targets and their histories.
            tables: where the rows are.
            target_set: the set of tables that targets are looked up in.
            history_set: the set that behaviours are looked up in.
            cross: by set, the rows of the cross tables.
            sequences: their names.
        """
        items = [batch.histories[name].item_M for name in sequences]
        categories = [batch.histories[name].category_M for name in sequences]

        def rows(name: str, item: list[Tensor], category: list[Tensor]) -> Tensor:
            ids: dict[Feature, Tensor] = {"item": torch.cat(item), "category": torch.cat(category)}
            return tables.inherent_rows(name, ids, torch.ones_like(ids["item"], dtype=torch.bool))

        counts = [len(item_M) for item_M in items]
        if target_set == history_set:
            together = rows(history_set, [*items, batch.item_T], [*categories, batch.category_T])
            *parts, target_TD = together.split([*counts, len(batch)])
        else:
            parts = rows(history_set, items, categories).split(counts)
            target_TD = rows(target_set, [batch.item_T], [batch.category_T])
        return cls(batch, target_TD, dict(zip(sequences, parts, strict=True)), cross[target_set], cross[history_set])


ClusterWeights = Callable[[Tensor, History], Tensor]
"""Of a sequence's rows (M, D) and windows: log of how many behaviours each pair's behaviour stands for, float32
(W,); -inf: another one stands for it."""


@torch.no_grad()
def search_locally(
    rows: AllRows, scoring: DotProduct, retrieved: Mapping[str, int], cluster_weights: ClusterWeights | None = None
) -> dict[str, Selection]:
    """The K best behaviours of each target in each sequence, by a score that is a dot product of rows.

    Args:
        rows: of all targets and behaviours.
        scoring: the score.
        retrieved: K by sequence.
        cluster_weights: adds to the score; None: each behaviour stands for itself.

    Returns:
        By sequence.
    """
    batch, found = rows.batch, {}
    target_T = torch.arange(len(batch), device=rows.target_TD.device)
    for sequence, k in retrieved.items():
        history, rows_MD = batch.histories[sequence], rows.behavior_MD[sequence]
        queries = scoring.queries(
            search_rows(rows.target_TD, partial(target_row, batch=batch), rows.target_cross[sequence])
        )
        ids_M = torch.arange(len(rows_MD), device=rows_MD.device)
        pairs = Pairs(history.start_T, history.end_T, len(rows_MD))
        index_W, target_W = pairs.of_behaviors(ids_M), pairs.of_targets(target_T)
        row = partial(behavior_row, batch=batch, history=history, index_X=index_W, target_X=target_W)
        additive_W = cross_score(pairs, queries.cross, row, rows.history_cross[sequence])
        weight_W = None if cluster_weights is None else cluster_weights(rows_MD, history)
        if weight_W is not None:
            additive_W = additive_W + weight_W
        query_TD = queries.inherent.contiguous()
        score_TK, index_TK = top_k(rows_MD, ids_M, history.start_T, history.end_T, query_TD, additive_W, k)
        valid_TK, log_count_TK = index_TK >= 0, None
        if weight_W is not None:
            valid_TK &= score_TK != -torch.inf
            place_TK = pairs.place(torch.where(valid_TK, index_TK, history.start_T[:, None]), history.start_T)
            log_count_TK = torch.where(valid_TK, gather_or_zeros(weight_W, place_TK), 0)
        found[sequence] = Selection(torch.where(valid_TK, index_TK, 0), valid_TK, log_count_TK)
    return found


CHUNK_PAIRS = {"cpu": 1 << 13, "cuda": 1 << 18}
"""So many pairs' rows are side by side at once: on a CPU what its caches hold."""


@torch.no_grad()
def search_by_score(
    rows: AllRows, scoring: Callable[[Rows, Rows], Tensor], retrieved: Mapping[str, int]
) -> dict[str, Selection]:
    """The K best behaviours of each target in each sequence; every pair is scored on its own.

    Args:
        rows: of all targets and behaviours.
        scoring: scores (C, N) of targets' rows (C, ...) and N behaviours' of each (C, N, ...).
        retrieved: K by sequence.

    Returns:
        By sequence.
    """
    found, device = {}, rows.target_TD.device
    target_T = torch.arange(len(rows.batch), device=device)
    for sequence, k in retrieved.items():
        history, rows_MD = rows.batch.histories[sequence], rows.behavior_MD[sequence]
        targets = search_rows(rows.target_TD, partial(target_row, batch=rows.batch), rows.target_cross[sequence])
        every = Selection.everything(history)
        longest = every.index_TK.shape[1]
        chunk = max(1, CHUNK_PAIRS[device.type] // max(1, longest))
        scores = [rows_MD.new_empty(0)]
        for target_C in target_T.split(chunk) if longest else ():
            index_CN, valid_CN = every.index_TK[target_C], every.valid_TK[target_C]
            cross = {
                feature: embedding(
                    behavior_row(feature, rows.batch, history, index_CN, target_C[:, None]) * valid_CN, rows_Rd
                )
                for feature, rows_Rd in rows.history_cross[sequence].items()
            }
            chosen = partial(_of_targets, target_C=target_C)
            score_CN = scoring(targets.map(chosen), Rows(embedding(index_CN, rows_MD), cross))
            scores.append(score_CN[valid_CN])
        found[sequence] = best_of_scores(torch.cat(scores), history, k)
    return found


def _of_targets(rows_Td: Tensor, target_C: Tensor) -> Tensor:
    return rows_Td.expand(len(target_C), -1) if len(rows_Td) == 1 else rows_Td[target_C]


def best_of_scores(score_W: Tensor, history: History, k: int) -> Selection:
    """The K best of each target's window; a behaviour whose score is -inf is not found.

    Args:
        score_W: float32, one window after the other.
        history: the behaviours and windows.
        k: K.
    """
    nothing = score_W.new_zeros(1, 1)
    ids_M = torch.zeros_like(history.item_M)
    query_TD = nothing.expand(len(history.start_T), 1).contiguous()
    score_TK, index_TK = top_k(nothing, ids_M, history.start_T, history.end_T, query_TD, score_W, k)
    valid_TK = (index_TK >= 0) & (score_TK != -torch.inf)
    return Selection(torch.where(valid_TK, index_TK, 0), valid_TK)


@torch.no_grad()
def search_by_signature(rows: AllRows, signature: Signature, retrieved: Mapping[str, int]) -> dict[str, Selection]:
    """The K behaviours of each target whose signatures have the least Hamming distance (ETA, arXiv 2108.04468).

    Args:
        rows: of all targets and behaviours.
        signature: of their item and category rows.
        retrieved: K by sequence.

    Returns:
        By sequence; of equal distances the earlier behaviour first.
    """
    target_TB, found = _signs(signature(rows.target_TD)), {}
    for sequence, k in retrieved.items():
        history = rows.batch.histories[sequence]
        # The product of two signatures is B less twice their distance.
        sign_MB = _signs(signature(rows.behavior_MD[sequence]))
        ids_M = torch.arange(len(sign_MB), device=sign_MB.device)
        nothing_W = sign_MB.new_zeros(int((history.end_T - history.start_T).sum()))
        _, index_TK = top_k(sign_MB, ids_M, history.start_T, history.end_T, target_TB, nothing_W, k)
        found[sequence] = Selection(index_TK.clamp(min=0), index_TK >= 0)
    return found


def _signs(bits: Tensor) -> Tensor:
    return torch.where(bits, 1.0, -1.0)
