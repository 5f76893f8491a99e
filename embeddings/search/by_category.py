"""Search by ids alone: the latest behaviours of the target's category, or the latest of all. No rows are looked up.

T = targets, K = behaviours to keep of each, N = longest window.
"""

from collections.abc import Mapping

import torch

from embeddings.batch import Batch, Selection
from embeddings.search.topk.api import top_k
from embeddings.search.topk.inputs import PartKind, ScorePart, TopKInputs

EXACT = 1 << 24
"""A float32 holds all integers below it."""


def search_by_category(
    batch: Batch, retrieved: Mapping[str, int], lengths: Mapping[str, int], *, filled: bool
) -> dict[str, Selection]:
    """Keep the K latest behaviours of the target's category ("hard search", SIM, arXiv 2006.05639, section 3.1).

    Args:
        batch: the targets and their histories; `embeddings.sizes.check_bounds` has checked it.
        retrieved: K by sequence.
        lengths: N by sequence.
        filled: where there are fewer than K, take the latest of the others after them.

    Returns:
        By sequence, the latest of the category first.
    """
    selected = {}
    for sequence, k in retrieved.items():
        history, longest = batch.histories[sequence], lengths[sequence]
        assert 2 * longest < EXACT, longest
        # The ordinary top K does the work, on rows of no dims: its score is how late a behaviour is, counted back from
        # the end of the window; N more puts every behaviour of the category above all others.
        position_R1 = -torch.arange(longest + 1, device=history.item_M.device, dtype=torch.float32)[:, None]
        one_11 = position_R1.new_ones(1, 1)
        other = 0.0 if filled else -torch.inf
        match_21 = torch.cat([one_11 * other, one_11 * longest])
        parts = [
            ScorePart(
                PartKind.MATCH, match_21, one_11, history.features_M["category"], batch.features_T["category"].long()
            ),
            ScorePart(PartKind.POSITION, position_R1, one_11, None, history.end_T),
        ]
        rows_RD, query_TD = position_R1.new_empty(1, 0), position_R1.new_empty(len(batch), 0)
        ids_M = torch.zeros_like(history.item_M)
        score_TK, index_TK = top_k(
            TopKInputs(rows_RD, ids_M, history.start_T, history.end_T, query_TD, k, parts, longest=longest)
        )
        valid_TK = (index_TK >= 0) & (score_TK != -torch.inf)
        selected[sequence] = Selection(torch.where(valid_TK, index_TK, 0), valid_TK)
    return selected


def latest(batch: Batch, retrieved: Mapping[str, int]) -> dict[str, Selection]:
    """Keep the K latest behaviours of each target, whatever they are; by sequence, the latest first."""
    return {sequence: Selection.latest(batch.histories[sequence], k) for sequence, k in retrieved.items()}
