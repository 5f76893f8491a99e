"""Signs of random projections: rows that point the same way share many of them (SimHash).

T = targets, M = behaviours of all users, D = dim of the inherent features together, B = bits, X = any shape.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from embeddings.search.all_rows import AllRows
from embeddings.search.selection import Selection
from embeddings.search.top_k import top_k


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


@torch.no_grad()
def search_by_signature(rows: AllRows, signature: Signature, retrieved: Mapping[str, int]) -> dict[str, Selection]:
    """The K behaviours of each target whose signatures have the least Hamming distance (ETA, arXiv 2108.04468).

    Args:
        rows: of all targets and behaviours.
        signature: of their item and category rows.
        retrieved: K by sequence.

    Returns:
        By sequence; of equal distances the earlier behaviour first.
    """
    target_TB, found = _signs(signature(rows.target_TD)), {}
    for sequence, k in retrieved.items():
        history = rows.batch.histories[sequence]
        # The product of two signatures is B less twice their distance.
        sign_MB = _signs(signature(rows.behavior_MD[sequence]))
        ids_M = torch.arange(len(sign_MB), device=sign_MB.device)
        nothing_W = sign_MB.new_zeros(int((history.end_T - history.start_T).sum()))
        _, behavior_TK = top_k(sign_MB, ids_M, history.start_T, history.end_T, target_TB, nothing_W, k)
        found[sequence] = Selection(behavior_TK.clamp(min=0), behavior_TK >= 0)
    return found


def _signs(bits: Tensor) -> Tensor:
    return torch.where(bits, 1.0, -1.0)
