"""Signs of random projections: rows that point the same way share many of them (SimHash).

T = targets, M = behaviours of all users, D = dim of the inherent features together, B = bits, X = any shape.
"""

import torch
from torch import Tensor, nn


class Signature(nn.Module):
    """B random directions, drawn with the first weights and never trained."""

    def __init__(self, dim: int, bits: int) -> None:
        super().__init__()
        self.directions = nn.Linear(dim, bits, bias=False).requires_grad_(False)

    @torch.no_grad()
    def forward(self, rows_XD: Tensor) -> Tensor:
        """On which side of each direction's plane a row is: bool (X, B)."""
        projected: Tensor = self.directions(rows_XD)
        return projected > 0
