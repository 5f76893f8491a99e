"""How well a behaviour matches a target.

T = targets, K = behaviours of each, D = dim of the inherent features together, d = dim of a cross feature, R, Q = rows.
"""

import torch
from torch import Tensor, nn

from embeddings.rows import Rows


class ScaledDotProduct(nn.Module):
    """``<e_i, v_t> / sqrt(K_A)``, the inherent features as one part and each cross feature as another (DARE, eq. 1).

    With item, category and position these are the two parts of the authors' code: (item and category parts) over
    ``sqrt(d_item + d_category)``, plus the position part over ``sqrt(d_position)``.
    """

    def forward(self, target: Rows, behaviors: Rows) -> Tensor:
        """Scores of K behaviours for each target.

        Args:
            target: rows (T, ...) of the targets' attention tables.
            behaviors: rows (T, K, ...) of the behaviours' attention tables.

        Returns:
            float32 (T, K).
        """
        score_TK = _dot(behaviors.inherent, self.inherent_query(target.inherent))
        for feature, rows_TKd in behaviors.cross.items():
            score_TK = score_TK + _dot(rows_TKd, target.cross[feature] * rows_TKd.shape[-1] ** -0.5)
        return score_TK

    def inherent_query(self, target_TD: Tensor) -> Tensor:
        """(T, D) such that its dot product with a behaviour's inherent rows is their part of the score."""
        return target_TD * target_TD.shape[-1] ** -0.5

    def cross_scores(self, target_Qd: Tensor, rows_Rd: Tensor) -> Tensor:
        """The part of one cross feature for each of Q target rows and R behaviour rows, (Q, R)."""
        return target_Qd @ rows_Rd.T * rows_Rd.shape[-1] ** -0.5


def _dot(rows_TKD: Tensor, query_TD: Tensor) -> Tensor:
    return torch.bmm(rows_TKD, query_TD.unsqueeze(2)).squeeze(2)


def attention_weights(score_TK: Tensor, valid_TK: Tensor) -> Tensor:
    """Softmax over the valid behaviours alone, (T, K); all 0 for a target that has none."""
    masked_TK = score_TK.masked_fill(~valid_TK, -torch.inf)
    any_T1 = valid_TK.any(dim=1, keepdim=True)
    return masked_TK.masked_fill(~any_T1, 0).softmax(dim=1) * valid_TK
