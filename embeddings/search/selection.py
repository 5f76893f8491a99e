"""Behaviours chosen of each target's history.

T = targets, K = chosen, N = longest window, M = behaviours of all users.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from embeddings.batch import History


@dataclass(frozen=True)
class Selection:
    """What search returns: for each target K of the M behaviours, the best first."""

    behavior_TK: Tensor
    """int64, counted in M; 0 where there is none."""
    valid_TK: Tensor
    """bool; False: the history has fewer than K."""
    log_count_TK: Tensor | None = None
    """float32: logarithm of how many behaviours each one stands for; None: for itself alone."""

    @classmethod
    def everything(cls, history: History) -> Self:
        """All N behaviours of each window, in time order."""
        length_T = history.end_T - history.start_T
        longest = int(length_T.max()) if len(length_T) else 0
        column_N = torch.arange(longest, device=length_T.device)
        valid_TN = column_N < length_T[:, None]
        return cls(torch.where(valid_TN, history.start_T[:, None] + column_N, 0), valid_TN)


def taken(values_M: Tensor, behavior_X: Tensor) -> Tensor:
    """``values_M[behavior_X]``, and zeros if there are no values at all, for windows that are all empty."""
    if not len(values_M):
        return values_M.new_zeros(*behavior_X.shape, *values_M.shape[1:])
    return values_M[behavior_X]
