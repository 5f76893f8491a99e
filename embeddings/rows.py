"""Embedding rows of targets or behaviours.

D = dim of the inherent features together, d = dim of a cross feature, E = dim of all features together.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from schemas.model import Feature

Concern = Literal["attention", "representation"]
"""What rows are used for."""


@dataclass(frozen=True)
class Rows:
    """Rows of the same targets (T, ...) or behaviours (T, K, ...) in one set of tables."""

    inherent: Tensor
    """float32 (..., D): item and category, concatenated."""
    cross: Mapping[Feature, Tensor]
    """float32 (..., d) each."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Rows":
        """``function`` of each part."""
        return Rows(function(self.inherent), {feature: function(rows) for feature, rows in self.cross.items()})

    def concatenated(self) -> Tensor:
        """All features side by side, (..., E)."""
        return torch.cat([self.inherent, *self.cross.values()], dim=-1) if self.cross else self.inherent
