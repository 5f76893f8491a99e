"""What the CPU's search loop is given: arrays, which numpy shares with tensors, and addresses.

R = rows of the table, D = dim, M = behaviours of all users, T = targets, W = (target, behaviour) pairs, U = units of
work, P = parts of the score.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# A part's tensors come as addresses: with arrays, code would be compiled anew for each number of parts.
PART = np.dtype(
    [
        ("kind", np.int64),
        ("rows", np.int64),  # how many
        ("mask", np.int64),
        ("column_M", np.int64),  # 0: there is none
        ("value_T", np.int64),  # 0: there is none
        ("score_R", np.int64),  # 0: each target has a query of its own
        ("rows_Rd", np.int64),
        ("query_Td", np.int64),
        ("dim", np.int64),
    ]
)
"""A `ScorePart`: numbers, and addresses of contiguous tensors."""


class TableRows(NamedTuple):
    """The rows that are searched."""

    rows_RD: NDArray[Any]
    """float32, int16 (float16), uint16 (bfloat16) or int8; neighbours in a row are neighbours in memory."""
    row_bytes: int
    """From one row to the next."""
    scale_R: NDArray[np.float32]
    """float32, what each row is multiplied by; empty if all are 1."""


class SearchWindows(NamedTuple):
    """What each target searches. Everything has been checked: ids are rows, windows lie within the behaviours."""

    ids_M: NDArray[Any]
    """int32 or int64."""
    start_T: NDArray[np.int64]
    end_T: NDArray[np.int64]
    query_TD: NDArray[np.float32]
    first_pair_T: NDArray[np.int64]
    """Where in ``additive_W`` a window begins."""
    additive_W: NDArray[np.float32]
    """Empty if there is none."""
    parts_P: NDArray[Any]
    """`PART`."""


class Units(NamedTuple):
    """Targets that are searched for together."""

    order_T: NDArray[np.int64]
    """The targets, unit by unit."""
    offset_U: NDArray[np.int64]
    """(U + 1,): unit u is ``order_T[offset_U[u]:offset_U[u + 1]]``."""
