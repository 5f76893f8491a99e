"""Scores of (target, behaviour) pairs from what small tables say of them.

T = targets, M = behaviours, W = pairs: all behaviours of the first target's window, then of the second's, ...,
R, Q = rows of a small table, d = its dim.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from embeddings.scoring import ScaledDotProduct
from schemas.model import Feature

CHUNK_PAIRS = 1 << 18
"""So many pairs' rows are side by side at once."""


class Pairs:
    """All pairs of a target and a behaviour in its window [start, end)."""

    def __init__(self, start_T: Tensor, end_T: Tensor, behaviors: int) -> None:
        self._length_T, self.device = end_T - start_T, start_T.device
        before_T = self._length_T.cumsum(0) - self._length_T
        self.count = int(self._length_T.sum())
        self._behavior_W: Tensor | None = None
        # Of users with one target each, whose windows are whole histories, the pairs are the behaviours.
        if self.count != behaviors or not torch.equal(start_T, before_T):
            self._behavior_W = torch.arange(self.count, device=start_T.device) + self.of_targets(start_T - before_T)

    def of_targets(self, values_T: Tensor) -> Tensor:
        """Each pair's target's value, (W,)."""
        return values_T.repeat_interleave(self._length_T, output_size=self.count)

    def of_behaviors(self, values_M: Tensor) -> Tensor:
        """Each pair's behaviour's value, (W,)."""
        return values_M if self._behavior_W is None else values_M.index_select(0, self._behavior_W)


def cross_score(
    pairs: Pairs,
    scoring: ScaledDotProduct,
    behavior_row: Callable[[Feature], Tensor],
    target_row: Callable[[Feature], Tensor | None],
    target_cross: Mapping[Feature, Tensor],
    history_cross: Mapping[Feature, Tensor],
) -> Tensor:
    """The cross features' part of each pair's score.

    Args:
        pairs: the W pairs.
        scoring: the score.
        behavior_row: of a feature, the behaviours' rows in the pairs, int32 or int64 (W,).
        target_row: of a feature, the targets' rows, integer (T,); None: row 0 for all.
        target_cross: all rows of the targets' cross tables.
        history_cross: all rows of the behaviours'.

    Returns:
        float32 (W,).
    """
    score_W: Tensor | None = None
    for feature, rows_Rd in history_cross.items():
        row_W, of_target_T = behavior_row(feature), target_row(feature)
        target_Qd = target_cross[feature][:1] if of_target_T is None else target_cross[feature]
        if of_target_T is not None:
            row_W = row_W + pairs.of_targets(of_target_T * len(rows_Rd))
        part_W = scoring.cross_scores(target_Qd, rows_Rd).flatten().index_select(0, row_W)
        score_W = part_W if score_W is None else score_W.add_(part_W)
    return torch.zeros(pairs.count, device=pairs.device) if score_W is None else score_W


def small_table_score(pairs: Pairs, query_Td: Tensor, rows_Rd: Tensor, row_W: Tensor) -> Tensor:
    """``<query, row>`` of each pair, float32 (W,); all products first if they are no more than the pairs.

    Args:
        pairs: the W pairs.
        query_Td: float32, of the targets.
        rows_Rd: float32, of the behaviours.
        row_W: int64, which row a pair's behaviour has.
    """
    target_W = pairs.of_targets(torch.arange(len(query_Td), device=query_Td.device))
    if len(query_Td) * len(rows_Rd) <= pairs.count:
        return (query_Td @ rows_Rd.T).flatten().index_select(0, target_W * len(rows_Rd) + row_W)
    chunks = zip(target_W.split(CHUNK_PAIRS), row_W.split(CHUNK_PAIRS), strict=True)
    return torch.cat([(query_Td[target] * rows_Rd[row]).sum(1) for target, row in chunks])
