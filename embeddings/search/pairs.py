"""Scores of (target, behaviour) pairs from what small tables say of them.

T = targets, M = behaviours, W = pairs: all behaviours of the first target's window, then of the second's, ...,
R = rows of a small table, Q = queries (one, or one a target), d = its dim.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from embeddings.features import Rows
from schemas.model import Feature

CHUNK_PAIRS = 1 << 18
"""So many pairs' rows are side by side at once."""

PRODUCTS_A_PAIR = 32
"""Where a matrix multiplication makes them, so many cost no more than reading a pair's two rows."""


class Pairs:
    """All pairs of a target and a behaviour in its window [start, end)."""

    def __init__(self, start_T: Tensor, end_T: Tensor, behaviors: int) -> None:
        self._length_T, self.device = end_T - start_T, start_T.device
        self._before_T = before_T = self._length_T.cumsum(0) - self._length_T
        self.count = int(self._length_T.sum())
        self._index_W: Tensor | None = None
        # Of users with one target each, whose windows are whole histories, the pairs are the behaviours.
        if self.count != behaviors or not torch.equal(start_T, before_T):
            self._index_W = torch.arange(self.count, device=start_T.device) + self.of_targets(start_T - before_T)

    def place(self, index_TK: Tensor, start_T: Tensor) -> Tensor:
        """Where among the W pairs each target's behaviours are, int64 (T, K); anywhere for an empty window."""
        place_TK = (self._before_T - start_T)[:, None] + index_TK
        return place_TK.clamp(max=max(0, self.count - 1))

    def of_targets(self, values_T: Tensor) -> Tensor:
        """Each pair's target's value, (W,)."""
        return values_T.repeat_interleave(self._length_T, output_size=self.count)

    def of_behaviors(self, values_M: Tensor) -> Tensor:
        """Each pair's behaviour's value, (W,)."""
        return values_M if self._index_W is None else values_M.index_select(0, self._index_W)


def search_rows(
    inherent_TD: Tensor, target_row: Callable[[Feature], Tensor | None], target_cross: Mapping[Feature, Tensor]
) -> Rows:
    """Targets' rows as scores make queries of them: a cross feature whose row is 0 for all targets has one row, (1, d).

    Args:
        inherent_TD: their item and category rows.
        target_row: of a cross feature, the targets' rows, integer (T,); None: row 0 for all.
        target_cross: all rows of the targets' cross tables.
    """
    cross = {}
    for feature, rows_Rd in target_cross.items():
        row_T = target_row(feature)
        cross[feature] = rows_Rd[:1] if row_T is None else rows_Rd.index_select(0, row_T)
    return Rows(inherent_TD, cross)


def cross_score(
    pairs: Pairs,
    queries: Mapping[Feature, Tensor],
    behavior_row: Callable[[Feature], Tensor],
    history_cross: Mapping[Feature, Tensor],
) -> Tensor:
    """The cross features' part of each pair's score.

    Args:
        pairs: the W pairs.
        queries: by feature, (T, d), or (1, d) for all targets.
        behavior_row: of a feature, the behaviours' rows in the pairs, int32 or int64 (W,).
        history_cross: all rows of the behaviours' cross tables.

    Returns:
        float32 (W,).
    """
    score_W: Tensor | None = None
    for feature, rows_Rd in history_cross.items():
        row_W, query_Qd = behavior_row(feature), queries[feature]
        if len(query_Qd) == 1:
            part_W = (query_Qd @ rows_Rd.T).flatten().index_select(0, row_W)
        else:
            part_W = small_table_score(pairs, query_Qd, rows_Rd, row_W)
        score_W = part_W if score_W is None else score_W.add_(part_W)
    return torch.zeros(pairs.count, device=pairs.device) if score_W is None else score_W


def small_table_score(pairs: Pairs, query_Td: Tensor, rows_Rd: Tensor, row_W: Tensor) -> Tensor:
    """``<query, row>`` of each pair, float32 (W,); all products first unless they are far more than the pairs.

    Args:
        pairs: the W pairs.
        query_Td: float32, of the targets.
        rows_Rd: float32, of the behaviours.
        row_W: int32 or int64, which row a pair's behaviour has.
    """
    target_W = pairs.of_targets(torch.arange(len(query_Td), device=query_Td.device))
    if len(query_Td) * len(rows_Rd) <= PRODUCTS_A_PAIR * pairs.count:
        return (query_Td @ rows_Rd.T).flatten().index_select(0, target_W * len(rows_Rd) + row_W)
    chunks = zip(target_W.split(CHUNK_PAIRS), row_W.split(CHUNK_PAIRS), strict=True)
    return torch.cat(
        [(query_Td.index_select(0, target) * rows_Rd.index_select(0, row)).sum(1) for target, row in chunks]
    )
