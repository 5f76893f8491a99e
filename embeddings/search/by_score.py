"""Search at home by any score of a target and a behaviour, a dot product or not.

T = targets, N = longest window, M = behaviours of all users, W = (target, behaviour) pairs, C = targets of a chunk.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding

from embeddings.batch import History
from embeddings.cross_features import behavior_row, target_row
from embeddings.rows import Rows
from embeddings.search.all_rows import AllRows
from embeddings.search.pairs import search_rows
from embeddings.search.selection import Selection
from embeddings.search.top_k import top_k

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
        longest = every.behavior_TK.shape[1]
        chunk = max(1, CHUNK_PAIRS[device.type] // max(1, longest))
        scores = [rows_MD.new_empty(0)]
        for target_C in target_T.split(chunk) if longest else ():
            behavior_CN, valid_CN = every.behavior_TK[target_C], every.valid_TK[target_C]
            cross = {
                feature: embedding(
                    behavior_row(feature, rows.batch, history, behavior_CN, target_C[:, None]) * valid_CN, rows_Rd
                )
                for feature, rows_Rd in rows.history_cross[sequence].items()
            }
            chosen = partial(_of_targets, target_C=target_C)
            score_CN = scoring(targets.map(chosen), Rows(embedding(behavior_CN, rows_MD), cross))
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
    score_TK, behavior_TK = top_k(nothing, ids_M, history.start_T, history.end_T, query_TD, score_W, k)
    valid_TK = (behavior_TK >= 0) & (score_TK != -torch.inf)
    return Selection(torch.where(valid_TK, behavior_TK, 0), valid_TK)
