"""SDIM: no search; the behaviours that hash as the target does are pooled (arXiv 2205.10249).

T = targets, K = behaviours of each, H = rounds of hashing, b = bits of a round, d = dim of one feature, E = dim of all
features together.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from embeddings.batch import Selection
from embeddings.features import Rows
from embeddings.layers.pooling import weighted_sum
from embeddings.models.eta import Eta
from schemas.errors import UserError

EPSILON = 1e-12
"""The least norm that a sum is divided by: an empty bucket's sum stays 0, and so does its gradient."""


class Sdim(Eta):
    """SDIM: in each of ``hash_bits / hash_width`` rounds, the behaviours whose signature is the target's are pooled.

    The mean of the rounds' normed sums is what the prediction sees, as in the paper. The paper builds a history's hash
    buckets apart from the prediction, on a server of their own; here they are made in each step. Position and the
    other cross features are pooled, but are not part of the signature. K has no effect, and there is no auxiliary loss.
    """

    searched = "none"
    attends_all = True

    def make_modules(self) -> None:
        """Make the random projections; each round has as many."""
        super().make_modules()
        if self.settings.hash_bits % self.settings.hash_width:
            raise UserError(
                f"model.hash_bits: must be a multiple of hash_width, {self.settings.hash_width} "
                f"(not {self.settings.hash_bits})"
            )

    def attention(self, target: Rows, behaviors: Rows, chosen: Selection) -> Tensor:
        """Weights (T, H, K): 1 where all bits of a round agree with the target's, else 0."""
        target_TH1b = self._rounds(target.inherent).unsqueeze(2)
        behavior_THKb = self._rounds(behaviors.inherent).transpose(1, 2)
        # All bits of a round agree with the chance ``(1 - angle / pi)^hash_width``, so near behaviours are pooled in
        # most rounds.
        same_THK = (target_TH1b == behavior_THKb).all(dim=3)
        return (same_THK & chosen.valid_TK.unsqueeze(1)).float()

    def pool(self, weight_TK: Tensor, behaviors: Rows) -> Rows:
        """Pool to the mean over rounds of ``sum / |sum|``, where the norm is of all features together."""
        rounds = weight_TK.shape[1]
        # The norm is that of the whole row, so the features' sums are joined before it is taken, and cut apart after.
        sums = [
            weighted_sum(weight_TK, rows_TKd).unflatten(1, (rounds, rows_TKd.shape[-1]))
            for rows_TKd in (behaviors.inherent, *behaviors.cross.values())
        ]
        unit_THE = normalize(torch.cat(sums, dim=2), dim=2, eps=EPSILON)
        inherent, *cross = unit_THE.mean(1).split([sum_THd.shape[2] for sum_THd in sums], dim=1)
        return Rows(inherent, dict(zip(behaviors.cross, cross, strict=True)))

    def pool_numbers(self, weight_TK: Tensor, number_TKn: Tensor) -> Tensor:
        """Pool to the mean over rounds of the bucket's mean, 0 for an empty bucket."""
        mean_THK = weight_TK / weight_TK.sum(2, keepdim=True).clamp(min=1)
        return torch.bmm(mean_THK, number_TKn).mean(1)

    def _rounds(self, rows: Tensor) -> Tensor:
        """Signatures by round, bool (..., H, b)."""
        bits: Tensor = self.signature(rows).unflatten(-1, (-1, self.settings.hash_width))
        return bits
