"""Search at home: the attention rows of all behaviours come to the rank that owns the sample, and it keeps the K best.

M = behaviours of all users, T = targets, W = (target, behaviour) pairs.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from embeddings.batch import History
from embeddings.cross_features import behavior_row, target_row
from embeddings.scoring import DotProduct
from embeddings.search.all_rows import AllRows
from embeddings.search.pairs import Pairs, cross_score, search_rows
from embeddings.search.selection import Selection, taken
from embeddings.search.top_k import top_k

StandsFor = Callable[[Tensor, History], Tensor]
"""Of a sequence's rows (M, D) and windows: log of how many behaviours each pair's behaviour stands for, float32
(W,); -inf: another one stands for it."""


@torch.no_grad()
def search_at_home(
    rows: AllRows, scoring: DotProduct, retrieved: Mapping[str, int], stands_for: StandsFor | None = None
) -> dict[str, Selection]:
    """The K best behaviours of each target in each sequence, by a score that is a dot product of rows.

    Args:
        rows: of all targets and behaviours.
        scoring: the score.
        retrieved: K by sequence.
        stands_for: adds to the score; None: each behaviour stands for itself.

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
        behavior_W, target_W = pairs.of_behaviors(ids_M), pairs.of_targets(target_T)
        row = partial(behavior_row, batch=batch, history=history, behavior_X=behavior_W, target_X=target_W)
        additive_W = cross_score(pairs, queries.cross, row, rows.history_cross[sequence])
        weight_W = None if stands_for is None else stands_for(rows_MD, history)
        if weight_W is not None:
            additive_W = additive_W + weight_W
        query_TD = queries.inherent.contiguous()
        score_TK, behavior_TK = top_k(rows_MD, ids_M, history.start_T, history.end_T, query_TD, additive_W, k)
        valid_TK, log_count_TK = behavior_TK >= 0, None
        if weight_W is not None:
            valid_TK &= score_TK != -torch.inf
            place_TK = pairs.place(torch.where(valid_TK, behavior_TK, history.start_T[:, None]), history.start_T)
            log_count_TK = torch.where(valid_TK, taken(weight_W, place_TK), 0)
        found[sequence] = Selection(torch.where(valid_TK, behavior_TK, 0), valid_TK, log_count_TK)
    return found
