"""Pooling: the weighted sum of a history's rows and numbers, and what the prediction sees of it.

T = targets, K = behaviours of each, H = heads, d = dim of one feature, E = dim of all features together, n = numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from embeddings.batch import Batch, Branch, gather_or_zeros
from embeddings.features import IndexedBehaviors, Rows
from embeddings.layers import row_products
from embeddings.sizes import FeatureSides


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
        inherent = [sums[feature] for feature in behaviors.inherent_features]
        cross = {feature: sums[feature] for feature in behaviors.cross_features}
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


class Numbers(NamedTuple):
    """Features of items and behaviours that stay numbers; n of them, or fewer of targets."""

    of_targets: Sequence[Tensor]
    """(T, n) of those that targets have; empty if there are none."""
    of_behaviors: Sequence[Tensor]
    """(T, K, n) for each branch; empty if there are none."""

    @classmethod
    def of(cls, batch: Batch, branches: Sequence[Branch], sides: FeatureSides) -> "Numbers":
        """Take the numbers of targets and of the behaviours that are pooled."""
        if not sides.numbers:
            return cls((), ())
        own = [batch.column(feature) for feature in sides.numbers if feature in sides.carried]
        of_behaviors = []
        for sequence, chosen in branches:
            history = batch.histories[sequence]
            columns = [gather_or_zeros(history.column(feature), chosen.index_TK) for feature in sides.numbers]
            of_behaviors.append(torch.stack(columns, dim=2))
        return cls([torch.stack(own, dim=1)] if own else [], of_behaviors)


def all_inputs(
    input_TI: Tensor,
    numbers: Numbers,
    weights: Sequence[Tensor],
    *,
    pool: Callable[[Tensor, Tensor], Tensor],
    context: Sequence[Tensor],
) -> Tensor:
    """All that a prediction sees: rows; numbers, the targets' own and those of histories, pooled; and the context.

    Args:
        input_TI: what it sees of rows.
        numbers: of targets, and of the behaviours of each branch.
        weights: (T, K) or (T, H, K) for each branch, 0 where there is no behaviour.
        pool: takes weights and numbers (T, K, n).
        context: what is known of users and impressions, (T, ...) each.
    """
    parts = [*numbers.of_targets]
    for number_TKn, weight_TK in zip(numbers.of_behaviors, weights, strict=bool(numbers.of_behaviors)):
        parts.append(pool(weight_TK, number_TKn.to(weight_TK.dtype)))
    others = [part.to(input_TI.dtype) for part in (*parts, *context)]
    return torch.cat([input_TI, *others], dim=1) if others else input_TI
