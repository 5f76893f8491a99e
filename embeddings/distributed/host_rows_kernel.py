"""Loops of `embeddings.distributed.host_rows` on a CPU. Compiled on first use, kept on disk.

R = rows of a table, d = their dim, I = rows looked up, U = distinct ones of them, X = places of a hash table.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.compiled import compiled
from embeddings.prefetch import into_second_level

SGD, ROWWISE_ADAGRAD, ADAGRAD = range(3)

AHEAD = 16
"""Rows that are prefetched."""

_SUMS = {"reassoc", "contract"}


@compiled()
def gather(weights_Rd: NDArray[Any], row_I: NDArray[np.int64], first: int, end: int, rows_Id: NDArray[Any]) -> None:
    """Copy the rows ``row_I[first:end]`` of a table to where they are in ``row_I``."""
    base, row_bytes = weights_Rd.ctypes.data, weights_Rd.shape[1] * weights_Rd.itemsize
    for index in range(first, end):
        if index + AHEAD < end:
            for begin in range(0, row_bytes, 64):
                into_second_level(base + row_I[index + AHEAD] * row_bytes + begin)
        for d in range(weights_Rd.shape[1]):
            rows_Id[index, d] = weights_Rd[row_I[index], d]


@compiled(fastmath=_SUMS)
def update(
    weights_Rd: NDArray[Any],
    state_X: NDArray[Any],
    row_I: NDArray[np.int64],
    gradient_Id: NDArray[Any],
    kind: int,
    rate: Any,
    epsilon: Any,
    part: int,
    parts: int,
) -> None:
    """Make one step of each row that was looked up, with the sum of its gradients.

    Args:
        weights_Rd: the table; changed.
        state_X: the optimizer's state, one value a row or as many as a row has; changed.
        row_I: the rows; they may repeat.
        gradient_Id: their gradients.
        kind: the optimizer.
        rate: learning rate.
        epsilon: added to the root of the state.
        part: which of the rows to update.
        parts: into how many parts rows are divided.
    """
    count, dim = row_I.shape[0], weights_Rd.shape[1]
    size = 16
    while size < 2 * count:
        size *= 2
    # Distinct rows in the order in which they come first, by a hash table: a sort would cost more than all the rest.
    number_X = np.full(size, -1, np.int64)
    row_U, first_U, times_U = np.empty(count, np.int64), np.empty(count, np.int64), np.zeros(count, np.int64)
    number_I = np.empty(count, np.int64)
    distinct, repeated = 0, 0
    for index in range(count):
        row = row_I[index]
        mixed = np.uint64(row) * np.uint64(0x9E3779B97F4A7C15)
        # Threads have rows of their own, so the order of a sum does not depend on their number.
        if parts > 1 and (mixed >> np.uint64(56)) % np.uint64(parts) != np.uint64(part):
            number_I[index] = -1
            continue
        place = np.int64(mixed >> np.uint64(20)) & (size - 1)
        while number_X[place] >= 0 and row_U[number_X[place]] != row:
            place = (place + 1) & (size - 1)
        number = number_X[place]
        if number < 0:
            number = number_X[place] = distinct
            row_U[number], first_U[number] = row, index
            distinct += 1
        times_U[number] += 1
        repeated += times_U[number] == 2
        number_I[index] = number
    # Only rows that repeat need a sum; where it is takes the place of where their first gradient is, counted from -1.
    sum_Sd = np.zeros((repeated, dim), gradient_Id.dtype)
    sums = 0
    if repeated:
        for index in range(count):
            number = number_I[index]
            if number >= 0 and times_U[number] > 1:
                if first_U[number] >= 0:
                    sums += 1
                    first_U[number] = -sums
                for d in range(dim):
                    sum_Sd[-first_U[number] - 1, d] += gradient_Id[index, d]
    base, row_bytes = weights_Rd.ctypes.data, dim * weights_Rd.itemsize
    states, state_bytes = state_X.ctypes.data, state_X.itemsize * (dim if kind == ADAGRAD else 1)
    for number in range(distinct):
        if number + AHEAD < distinct:
            ahead = row_U[number + AHEAD]
            for begin in range(0, row_bytes, 64):
                into_second_level(base + ahead * row_bytes + begin)
            if kind != SGD:
                into_second_level(states + ahead * state_bytes)
        row, at = row_U[number], first_U[number]
        gradient_Xd, at = (gradient_Id, at) if at >= 0 else (sum_Sd, -at - 1)
        if kind == ADAGRAD:
            for d in range(dim):
                gradient = gradient_Xd[at, d]
                state_X[row * dim + d] += gradient * gradient
                weights_Rd[row, d] -= rate * gradient / (np.sqrt(state_X[row * dim + d]) + epsilon)
            continue
        step = rate
        if kind == ROWWISE_ADAGRAD:
            square = gradient_Xd[at, 0] * gradient_Xd[at, 0]
            for d in range(1, dim):
                square += gradient_Xd[at, d] * gradient_Xd[at, d]
            state_X[row] += square / weights_Rd.dtype.type(dim)
            step = rate / (np.sqrt(state_X[row]) + epsilon)
        for d in range(dim):
            weights_Rd[row, d] -= step * gradient_Xd[at, d]
