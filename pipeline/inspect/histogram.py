"""Exact distribution of small integers: memory grows with the largest value, not with how many there are."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Histogram:
    """How often each value 0, 1, 2, ... was seen."""

    def __init__(self) -> None:
        self.count_V: NDArray[np.int64] = np.zeros(0, np.int64)

    def add(self, values: NDArray[Any]) -> None:
        """Count values, integers of any type and at least 0."""
        count_V = np.bincount(values, minlength=len(self.count_V)).astype(np.int64)
        count_V[: len(self.count_V)] += self.count_V
        self.count_V = count_V

    @property
    def seen(self) -> int:
        """How many values were counted."""
        return int(self.count_V.sum())

    @property
    def sum(self) -> int:
        """Sum of the values."""
        return int(self.count_V @ np.arange(len(self.count_V)))

    def quantiles(self, fractions: Sequence[float]) -> list[int]:
        """For each fraction (0 .. 1), the smallest value that so many do not exceed; 0 where none was counted."""
        if not self.seen:
            return [0] * len(fractions)
        needed = np.maximum(np.ceil(np.asarray(fractions) * self.seen), 1)
        return np.searchsorted(np.cumsum(self.count_V), needed).tolist()
