"""Loops of `embeddings.layers.row_products` on a CPU. Compiled on first use, kept on disk.

T = targets, K = behaviours of each, L = rows, d = their dim.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.compiled import compiled

# No array is cut into its rows here: each cut counts up who uses the array, in memory that all threads share.

# A sum may be made in several parts side by side, which vectors need; its order is that of the compiled code, always.
_SUMS = {"reassoc", "contract"}


@compiled(fastmath=_SUMS)
def dot(
    query_Td: NDArray[Any],
    rows_Ld: NDArray[Any],
    index_TK: NDArray[np.int64],
    first: int,
    end: int,
    score_TK: NDArray[Any],
) -> None:
    """Write the products of each target's query with its K rows, for the targets ``first`` .. ``end``."""
    for target in range(first, end):
        for column in range(index_TK.shape[1]):
            row = index_TK[target, column]
            total = score_TK.dtype.type(0)
            for d in range(query_Td.shape[1]):
                total += query_Td[target, d] * rows_Ld[row, d]
            score_TK[target, column] = total


@compiled(fastmath=_SUMS)
def weighted_sum(
    weight_TK: NDArray[Any],
    rows_Ld: NDArray[Any],
    index_TK: NDArray[np.int64],
    first: int,
    end: int,
    sum_Td: NDArray[Any],
) -> None:
    """Write the weighted sum of each target's K rows, for the targets ``first`` .. ``end``."""
    for target in range(first, end):
        for d in range(sum_Td.shape[1]):
            sum_Td[target, d] = 0
        for column in range(index_TK.shape[1]):
            weight, row = weight_TK[target, column], index_TK[target, column]
            for d in range(sum_Td.shape[1]):
                sum_Td[target, d] += weight * rows_Ld[row, d]


@compiled(fastmath=_SUMS)
def outer(
    weight_TK: NDArray[Any],
    query_Td: NDArray[Any],
    index_TK: NDArray[np.int64],
    in_order: bool,
    first: int,
    end: int,
    rows_Ld: NDArray[Any],
) -> None:
    """Add ``weight_TK[t, k] * query_Td[t]`` to the row of each target and column, for the rows ``first`` .. ``end``.

    Where the index names each row once, in order, it is written and not added.
    """
    targets, columns = index_TK.shape
    if in_order:
        for row in range(first, end):
            target = row // columns
            weight = weight_TK[target, row % columns]
            for d in range(query_Td.shape[1]):
                rows_Ld[row, d] = weight * query_Td[target, d]
        return
    # Threads have rows and not targets: so they never write to one place, and the order of a sum is that of the
    # targets, whatever the number of threads.
    for target in range(targets):
        for column in range(columns):
            row = index_TK[target, column]
            if first <= row < end:
                weight = weight_TK[target, column]
                for d in range(query_Td.shape[1]):
                    rows_Ld[row, d] += weight * query_Td[target, d]
