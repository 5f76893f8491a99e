"""SDIM: no search; behaviours that hash as the target does are pooled (arXiv 2205.10249).

T = targets, K = behaviours of each, H = rounds, B = bits of all rounds, b = bits of one, E = dim of all features.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from embeddings.batch import Selection
from embeddings.features import Rows
from embeddings.layers.pooling import weighted_sum
from embeddings.models.eta import Eta
from schemas.errors import UserError


class Sdim(Eta):
    """``hash_bits / hash_width`` rounds, each pooling the behaviours whose signature is the target's."""

    searched = "none"
    attends_all = True

    def make_modules(self) -> None:
        """The random projections, so many a round."""
        super().make_modules()
        if self.settings.hash_bits % self.settings.hash_width:
            raise UserError(
                f"model.hash_bits: must be a multiple of hash_width, {self.settings.hash_width} "
                f"(not {self.settings.hash_bits})"
            )

    def attention(self, target: Rows, behaviors: Rows, chosen: Selection) -> Tensor:
        """Where the signatures of a round agree, (T, H, K) of 0 and 1."""
        target_TH1b = self._rounds(target.inherent).unsqueeze(2)
        behavior_THKb = self._rounds(behaviors.inherent).transpose(1, 2)
        same_THK = (target_TH1b == behavior_THKb).all(dim=3)
        return (same_THK & chosen.valid_TK.unsqueeze(1)).float()

    def pool(self, weight_TK: Tensor, behaviors: Rows) -> Rows:
        """The mean over rounds of ``sum / |sum|``, the sums over all features together."""
        rounds = weight_TK.shape[1]
        sums = [
            weighted_sum(weight_TK, rows_TKd).unflatten(1, (rounds, rows_TKd.shape[-1]))
            for rows_TKd in (behaviors.inherent, *behaviors.cross.values())
        ]
        unit_THE = normalize(torch.cat(sums, dim=2), dim=2, eps=EPSILON)
        inherent, *cross = unit_THE.mean(1).split([sum_THd.shape[2] for sum_THd in sums], dim=1)
        return Rows(inherent, dict(zip(behaviors.cross, cross, strict=True)))

    def _rounds(self, rows: Tensor) -> Tensor:
        """Signatures (..., H, b)."""
        bits: Tensor = self.signature(rows).unflatten(-1, (-1, self.settings.hash_width))
        return bits


EPSILON = 1e-12
"""Under a norm; an empty bucket's sum stays 0, and so does its gradient."""
