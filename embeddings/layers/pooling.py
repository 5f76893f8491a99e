"""Pooling: the weighted sum of a history's rows, and what the prediction sees of it.

T = targets, K = behaviours of each, H = heads, d = dim of one feature, E = dim of all features together.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from embeddings.features import IndexedBehaviors, Rows
from embeddings.layers import row_products
from schemas.model import INHERENT


@dataclass(frozen=True)
class Representation:
    """Representation rows of T targets, and their histories in one sequence, pooled."""

    target: Rows
    """(T, ...)."""
    pooled: Rows
    """``sum_i w_i e_i`` (T, ...)."""


def pooled(weight_TK: Tensor, behaviors: Rows) -> Rows:
    """Pool representation rows of behaviours (T, K, ...) with their weights: ``sum_i w_i e_i``, (T, ...)."""
    if isinstance(behaviors, IndexedBehaviors) and weight_TK.dim() == 2:
        sums = {feature: row_products.weighted_sum(weight_TK, *rows) for feature, rows in behaviors.features.items()}
        inherent = [sum_Td for feature, sum_Td in sums.items() if feature in INHERENT]
        cross = {feature: sum_Td for feature, sum_Td in sums.items() if feature not in INHERENT}
        return Rows(torch.cat(inherent, dim=1) if len(inherent) > 1 else inherent[0], cross)
    return behaviors.map(lambda rows_TKd: weighted_sum(weight_TK, rows_TKd))


def weighted_sum(weight_TK: Tensor, rows_TKd: Tensor) -> Tensor:
    """``sum_i w_i e_i``: (T, d), or, of weights (T, H, K), the sums of the heads side by side, (T, H * d)."""
    weight_THK = weight_TK if weight_TK.dim() == 3 else weight_TK.unsqueeze(1)
    # A product of matrices: ``weight * rows`` and then a sum would write (T, K, d) once more.
    return torch.bmm(weight_THK, rows_TKd).flatten(1)


def history_inputs(representation: Representation, target_aware: bool) -> list[Tensor]:
    """What a prediction sees of a history: ``sum_i w_i e_i``, and its product with the target (DARE, section 3.2).

    ``h = sum_i w_i (e_i * v_t)`` with an element-wise product; the target does not depend on i, so it is one product
    with the pooled rows.

    Args:
        representation: of the targets and their histories.
        target_aware: with the product ("target-aware representation", TR).

    Returns:
        float32 (T, E) each.
    """
    pooled_TE = representation.pooled.concatenated()
    return [pooled_TE, pooled_TE * representation.target.concatenated()] if target_aware else [pooled_TE]
