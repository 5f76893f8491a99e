"""What a target's history says about it.

T = targets, K = behaviours of each, E = dim of all features together.
"""

import torch
from torch import Tensor

from embeddings.rows import Rows


def pooled(weight_TK: Tensor, behaviors: Rows) -> Tensor:
    """``sum_i w_i e_i``, (T, E), of the behaviours' representation rows (T, K, ...)."""
    return behaviors.map(lambda rows: torch.bmm(weight_TK.unsqueeze(1), rows).squeeze(1)).concatenated()


def history_inputs(weight_TK: Tensor, target: Rows, behaviors: Rows, target_aware: bool) -> list[Tensor]:
    """What a prediction sees of a history: ``sum_i w_i e_i``, and its product with the target (DARE, section 3.2).

    ``h = sum_i w_i (e_i * v_t)`` with an element-wise product; the target does not depend on i, so it is one product
    with the pooled rows.

    Args:
        weight_TK: float32, attention weights.
        target: rows (T, ...) of the targets' representation tables.
        behaviors: rows (T, K, ...) of the behaviours' representation tables.
        target_aware: with the product ("target-aware representation", TR).

    Returns:
        float32 (T, E) each.
    """
    pooled_TE = pooled(weight_TK, behaviors)
    return [pooled_TE, pooled_TE * target.concatenated()] if target_aware else [pooled_TE]
