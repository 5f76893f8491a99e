"""Search at home by any score of a target and a behaviour, a dot product or not.

T = targets, M = behaviours of all users, W = (target, behaviour) pairs, C = pairs of a chunk.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from embeddings.batch import History
from embeddings.cross_features import behavior_row, target_row
from embeddings.rows import Rows
from embeddings.search.all_rows import AllRows
from embeddings.search.pairs import Pairs, search_rows
from embeddings.search.selection import Selection
from embeddings.search.top_k import top_k

CHUNK_PAIRS = 1 << 16
"""So many pairs' rows are side by side at once."""


@torch.no_grad()
def search_by_score(
    rows: AllRows, scoring: Callable[[Rows, Rows], Tensor], retrieved: Mapping[str, int]
) -> dict[str, Selection]:
    """The K best behaviours of each target in each sequence; every pair is scored on its own.

    Args:
        rows: of all targets and behaviours.
        scoring: scores (C, 1) of targets' rows (C, ...) and one behaviour's (C, 1, ...) each.
        retrieved: K by sequence.

    Returns:
        By sequence.
    """
    found = {}
    for sequence, k in retrieved.items():
        history, rows_MD = rows.batch.histories[sequence], rows.behavior_MD[sequence]
        targets = search_rows(rows.target_TD, partial(target_row, batch=rows.batch), rows.target_cross[sequence])
        pairs = Pairs(history.start_T, history.end_T, len(rows_MD))
        behavior_W = pairs.of_behaviors(torch.arange(len(rows_MD), device=rows_MD.device))
        target_W = pairs.of_targets(torch.arange(len(rows.batch), device=rows_MD.device))
        scores = [rows_MD.new_empty(0)]
        for behavior_C, target_C in zip(behavior_W.split(CHUNK_PAIRS), target_W.split(CHUNK_PAIRS), strict=True):
            of_behavior = {
                feature: rows_Rd[behavior_row(feature, rows.batch, history, behavior_C, target_C)]
                for feature, rows_Rd in rows.history_cross[sequence].items()
            }
            behaviors = Rows(rows_MD[behavior_C], of_behavior).map(lambda part_Cd: part_Cd.unsqueeze(1))
            chosen = partial(_of_targets, target_C=target_C)
            scores.append(scoring(targets.map(chosen), behaviors).squeeze(1))
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
    score_TK, behavior_TK = top_k(nothing, ids_M, history.start_T, history.end_T, query_TD, score_W, k)
    valid_TK = (behavior_TK >= 0) & (score_TK != -torch.inf)
    return Selection(torch.where(valid_TK, behavior_TK, 0), valid_TK)
