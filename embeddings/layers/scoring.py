"""How well a behaviour matches a target.

T = targets, K = behaviours of each, H = heads, D = dim of the inherent features together, E = of all features together.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from embeddings.features import Rows
from embeddings.layers.projections import RowsMap


class DotProduct(nn.Module):
    """A score that is the dot product of a behaviour's rows and a query; shards can search by it.

    A score of this kind says how the query is made of the target's rows.
    """

    def queries(self, target: Rows) -> Rows:
        """What the behaviours' rows are multiplied by, with the dims of those.

        Args:
            target: rows of the targets' attention tables; a cross feature may have one row for all targets, (1, d).

        Returns:
            Queries (T, ...), one for all targets where their row is.
        """
        raise NotImplementedError

    def products(self, dim: int) -> int:
        """Multiplications of a pair whose rows have ``dim`` floats, for plans."""
        return dim

    def forward(self, target: Rows, behaviors: Rows) -> Tensor:
        """Scores of K behaviours for each target.

        Args:
            target: rows (T, ...) of the targets' attention tables.
            behaviors: rows (T, K, ...) of the behaviours' attention tables.

        Returns:
            float32 (T, K).
        """
        return product(self.queries(target), behaviors)


class ScaledDotProduct(DotProduct):
    """``<e_i, v_t> / sqrt(K_A)``, the inherent features as one part and each cross feature as another (DARE, eq. 1).

    With item, category and position these are the two parts of the authors' code: (item and category parts) over
    ``sqrt(d_item + d_category)``, plus the position part over ``sqrt(d_position)``.
    """

    def queries(self, target: Rows) -> Rows:
        """The targets' rows, each part over the root of its dim."""
        return target.map(lambda rows_Td: rows_Td * rows_Td.shape[-1] ** -0.5)


class MappedScore(nn.Module):
    """The scaled dot product of what two maps make of the rows; any maps."""

    def __init__(self, of_target: RowsMap, of_behavior: RowsMap) -> None:
        super().__init__()
        self.of_target, self.of_behavior = of_target, of_behavior
        self.scaled = ScaledDotProduct()

    def products(self, dim: int) -> int:
        """Multiplications of a pair, for plans: behaviours are mapped, one by one."""
        return sum(weight.numel() for weight in self.of_behavior.parameters()) + dim

    def forward(self, target: Rows, behaviors: Rows) -> Tensor:
        """Scores of K behaviours for each target, float32 (T, K); arguments as of `DotProduct`."""
        score_TK: Tensor = self.scaled(self.of_target(target), self.of_behavior(behaviors))
        return score_TK


class MappedDotProduct(DotProduct, MappedScore):
    """The scaled dot product of two linear maps: ``<A e_i + a, B v_t + b> = <e_i, A^T (B v_t + b)> + <a, B v_t + b>``.

    The second part is the same for all behaviours of a target. So no behaviour is mapped, which for long histories
    would take the most room and time.
    """

    def forward(self, target: Rows, behaviors: Rows) -> Tensor:
        """Scores of K behaviours for each target, float32 (T, K); arguments as of `DotProduct`."""
        mapped = self.scaled.queries(self.of_target(target))
        score_TK = product(self.of_behavior.transposed(mapped), behaviors)
        return score_TK + self.of_behavior.bias_product(mapped).unsqueeze(1)

    def queries(self, target: Rows) -> Rows:
        """``A^T (B v_t + b)``: what ranks behaviours by their rows as the score ranks them."""
        return self.of_behavior.transposed(self.scaled.queries(self.of_target(target)))


class DinScore(nn.Module):
    """A perceptron of ``[q, k, q - k, q * k]``, all over their dim (DIN, arXiv 1706.06978; the authors' code)."""

    HIDDEN = 36

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4 * dim, self.HIDDEN), nn.PReLU(init=0.1), nn.Linear(self.HIDDEN, 1))

    def products(self, dim: int) -> int:
        """Multiplications of a pair whose rows have ``dim`` floats, for plans."""
        return self.HIDDEN * (dim + 1)

    def forward(self, target: Rows, behaviors: Rows) -> Tensor:
        """Scores of K behaviours for each target, float32 (T, K); arguments as of `DotProduct`."""
        first, *others = self.layers
        assert isinstance(first, nn.Linear)
        query_TE, key_TKE = target.concatenated(), behaviors.concatenated()
        # The first layer of [q, k, q - k, q * k], without the four side by side; of many behaviours as a matrix of each
        # target's own, so that each is multiplied once.
        of_query, of_key, of_difference, of_product = first.weight.chunk(4, dim=1)
        per_target = linear(query_TE, of_query + of_difference).unsqueeze(1)
        if key_TKE.shape[1] > self.HIDDEN:
            matrix_TEh = (of_key - of_difference).T + query_TE.unsqueeze(2) * of_product.T
            per_pair = torch.bmm(key_TKE, matrix_TEh)
        else:
            per_pair = linear(key_TKE, of_key - of_difference) + linear(query_TE.unsqueeze(1) * key_TKE, of_product)
        hidden_TKh = (per_target + per_pair) / key_TKE.shape[2] + first.bias
        for layer in others:
            hidden_TKh = layer(hidden_TKh)
        return hidden_TKh.squeeze(2)


class MultiHeadScore(nn.Module):
    """``<A_h v_t, B_h e_i> / sqrt(dim of a head)`` for each of H heads (SIM, arXiv 2006.05639, section 3.2)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, -(-dim // heads)
        self.of_target = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.of_behavior = nn.Linear(dim, heads * self.head_dim, bias=False)

    def forward(self, target: Rows, behaviors: Rows) -> Tensor:
        """Scores of K behaviours for each target, float32 (T, H, K); arguments as of `DotProduct`."""
        query_THd = self.of_target(target.concatenated()).unflatten(1, (self.heads, self.head_dim))
        # <q, B_h e> = <B_h^T q, e>: so no behaviour is mapped.
        matrix_HdE = self.of_behavior.weight.unflatten(0, (self.heads, self.head_dim))
        query_THE = torch.einsum("thd,hde->the", query_THd, matrix_HdE) * self.head_dim**-0.5
        return torch.bmm(query_THE, behaviors.concatenated().transpose(1, 2))


def product(query: Rows, behaviors: Rows) -> Tensor:
    """The dot product over all features, float32 (T, K), of queries (T, ...) and K behaviours of each (T, K, ...)."""
    score_TK = _dot(behaviors.inherent, query.inherent)
    for feature, rows_TKd in behaviors.cross.items():
        score_TK = score_TK + _dot(rows_TKd, query.cross[feature])
    return score_TK


def _dot(rows_TKD: Tensor, query_TD: Tensor) -> Tensor:
    return torch.bmm(rows_TKD, query_TD.expand(len(rows_TKD), -1).unsqueeze(2)).squeeze(2)


def attention_weights(score_TK: Tensor, valid_TK: Tensor) -> Tensor:
    """Softmax over the valid behaviours alone; all 0 for a target that has none.

    Args:
        score_TK: (T, K), or (T, H, K).
        valid_TK: bool.

    Returns:
        The shape of the scores.
    """
    valid = valid_TK if score_TK.dim() == 2 else valid_TK.unsqueeze(1)
    masked = score_TK.masked_fill(~valid, -torch.inf)
    any_of_them = valid.any(dim=-1, keepdim=True)
    return masked.masked_fill(~any_of_them, 0).softmax(dim=-1) * valid
