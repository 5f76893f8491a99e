"""Scores of (target, behaviour) pairs from small tables, which depend on both and so cannot be a row of either.

T = targets, K = behaviours selected of each, M = behaviours of all users, W = pairs: all behaviours of the first
target's window, then of the second's, ..., R = rows of a small table, d = its dim, Q = queries (one, or one a target),
D = dim of the inherent features together.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from embeddings.features import Rows
from schemas.model import Feature

CHUNK_PAIRS = 1 << 18
"""How many pairs' rows are in memory at once."""

PRODUCTS_A_PAIR = 32
"""How many products a matrix multiplication makes in the time in which the two rows of one pair are read."""


class Pairs:
    """All pairs of a target and a behaviour in its window [start_T[t], end_T[t]).

    Args:
        start_T: int64, where each window begins, counted in M.
        end_T: int64, where it ends.
        behaviors: M.
    """

    def __init__(self, start_T: Tensor, end_T: Tensor, behaviors: int) -> None:
        self._length_T, self.device = end_T - start_T, start_T.device
        first_pair_T = self._length_T.cumsum(0) - self._length_T
        # The pair of behaviour m in the window of target t is number ``m + offset_T[t]``.
        self._offset_T = first_pair_T - start_T
        # On a GPU the host waits for this number once, so that nothing below has to ask for a length again.
        self.count = int(self._length_T.sum())
        """W."""
        self._index_W: Tensor | None = None
        # Where users have one target each, whose window is the whole history, the pairs are the behaviours themselves.
        if self.count != behaviors or not torch.equal(start_T, first_pair_T):
            self._index_W = torch.arange(self.count, device=start_T.device) + self.of_targets(start_T - first_pair_T)

    def pair_index(self, index_TK: Tensor) -> Tensor:
        """Which of the W pairs each target is with its selected behaviours.

        Args:
            index_TK: int64, which of the M behaviours; it must lie within the target's window.

        Returns:
            int64 (T, K); arbitrary, but within W, for a target whose window is empty.
        """
        return (self._offset_T[:, None] + index_TK).clamp(max=max(0, self.count - 1))

    def of_targets(self, values_T: Tensor) -> Tensor:
        """The value of each pair's target, (W,)."""
        return values_T.repeat_interleave(self._length_T, output_size=self.count)

    def of_behaviors(self, values_M: Tensor) -> Tensor:
        """The value of each pair's behaviour, (W,)."""
        return values_M if self._index_W is None else values_M.index_select(0, self._index_W)


def search_rows(
    inherent_TD: Tensor, target_row: Callable[[Feature], Tensor | None], target_cross: Mapping[Feature, Tensor]
) -> Rows:
    """Rows of the targets, from which scores make their queries; features with one row for all targets keep one.

    Args:
        inherent_TD: item and category rows of the targets.
        target_row: takes a cross feature, returns the targets' rows in its table, integer (T,); None: row 0 for all.
        target_cross: all rows of the targets' cross tables.

    Returns:
        (T, ...); a cross feature whose row is 0 for all targets has one row, (1, d).
    """
    cross = {}
    for feature, rows_Rd in target_cross.items():
        row_T = target_row(feature)
        # One row stays one row: `cross_score` then scores R rows once, not once for each of T targets.
        cross[feature] = rows_Rd[:1] if row_T is None else rows_Rd.index_select(0, row_T)
    return Rows(inherent_TD, cross)


def cross_score(
    pairs: Pairs,
    queries: Mapping[Feature, Tensor],
    behavior_row: Callable[[Feature], Tensor],
    history_cross: Mapping[Feature, Tensor],
) -> Tensor:
    """The part of each pair's score that the cross features make.

    Args:
        pairs: the W pairs.
        queries: by feature, (T, d), or (1, d) for all targets.
        behavior_row: takes a cross feature, returns the rows of the pairs' behaviours, int32 or int64 (W,).
        history_cross: all rows of the behaviours' cross tables.

    Returns:
        float32 (W,).
    """
    score_W: Tensor | None = None
    for feature, rows_Rd in history_cross.items():
        row_W, query_Qd = behavior_row(feature), queries[feature]
        if len(query_Qd) == 1:
            # One query for all targets: score each row of the table once, and let the pairs look their scores up.
            part_W = (query_Qd @ rows_Rd.T).flatten().index_select(0, row_W)
        else:
            part_W = small_table_score(pairs, query_Qd, rows_Rd, row_W)
        # In place: with a float for each pair, it is one of the largest tensors of a search.
        score_W = part_W if score_W is None else score_W.add_(part_W)
    return torch.zeros(pairs.count, device=pairs.device) if score_W is None else score_W


def small_table_score(pairs: Pairs, query_Td: Tensor, rows_Rd: Tensor, row_W: Tensor) -> Tensor:
    """The product ``<query, row>`` of each pair.

    All T x R products are made first, in one matrix multiplication, unless they are far more than the pairs.

    Args:
        pairs: the W pairs.
        query_Td: float32, of the targets.
        rows_Rd: float32, all rows of the table.
        row_W: int32 or int64, the row of each pair's behaviour.

    Returns:
        float32 (W,).
    """
    target_W = pairs.of_targets(torch.arange(len(query_Td), device=query_Td.device))
    # All T x R products and then one float a pair, or, where most of the products would go unused, the pairs' own rows.
    if len(query_Td) * len(rows_Rd) <= PRODUCTS_A_PAIR * pairs.count:
        return (query_Td @ rows_Rd.T).flatten().index_select(0, target_W * len(rows_Rd) + row_W)
    # In pieces, because two rows are copied for each pair.
    chunks = zip(target_W.split(CHUNK_PAIRS), row_W.split(CHUNK_PAIRS), strict=True)
    return torch.cat(
        [(query_Td.index_select(0, target) * rows_Rd.index_select(0, row)).sum(1) for target, row in chunks]
    )
