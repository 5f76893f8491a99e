"""Search by ids alone: the latest behaviours of the target's category, or the latest of all. No rows are looked up.

T = targets, K = behaviours to keep of each, W = (target, behaviour) pairs.
"""

from collections.abc import Mapping

import torch

from embeddings.batch import Batch, Selection, gather_or_zeros
from embeddings.search.local import select_best
from embeddings.search.pairs import Pairs

EXACT = 1 << 24
"""A float32 holds all integers below it."""


def search_by_category(batch: Batch, retrieved: Mapping[str, int], *, filled: bool) -> dict[str, Selection]:
    """Keep the K latest behaviours of the target's category ("hard search", SIM, arXiv 2006.05639, section 3.1).

    Args:
        batch: the targets and their histories.
        retrieved: K by sequence.
        filled: where there are fewer than K, take the latest of the others after them.

    Returns:
        By sequence, the latest of the category first.
    """
    selected = {}
    for sequence, k in retrieved.items():
        history = batch.histories[sequence]
        pairs = Pairs(history.start_T, history.end_T, len(history.item_M))
        # The ordinary top K does the work: the order in time, as a float, is the score.
        index_W = pairs.of_behaviors(torch.arange(len(history.item_M), device=history.item_M.device))
        same_W = gather_or_zeros(history.category_M, index_W) == pairs.of_targets(batch.category_T)
        # Counted within the window, so that indices stay exact as floats however many users a batch has.
        order_W = index_W - pairs.of_targets(history.start_T)
        longest = int((history.end_T - history.start_T).max()) if len(batch) else 0
        assert 2 * longest < EXACT, longest
        others_W = order_W.float() if filled else torch.full_like(order_W, -torch.inf, dtype=torch.float32)
        # Adding the longest window puts every behaviour of the category above all others.
        selected[sequence] = select_best(torch.where(same_W, (order_W + longest).float(), others_W), history, k)
    return selected


def latest(batch: Batch, retrieved: Mapping[str, int]) -> dict[str, Selection]:
    """Keep the K latest behaviours of each target, whatever they are; by sequence, the latest first."""
    selected = {}
    for sequence, k in retrieved.items():
        history = batch.histories[sequence]
        index_TK = history.end_T[:, None] - torch.arange(1, k + 1, device=history.end_T.device)
        # Windows end right before their target, so the K latest are the last K of the window: nothing needs to be
        # compared.
        valid_TK = index_TK >= history.start_T[:, None]
        selected[sequence] = Selection(torch.where(valid_TK, index_TK, 0), valid_TK)
    return selected
