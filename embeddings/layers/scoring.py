"""Scores: how well a behaviour matches a target; and the attention weights that are made of them.

T = targets, K = behaviours of each, H = heads, D = dim of the inherent features together, d = dim of one feature, or
of one head, E = dim of all features together, h = hidden units.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from embeddings.features import IndexedBehaviors, Rows
from embeddings.layers import row_products
from embeddings.layers.projections import RowsMap


class DotProduct(nn.Module):
    """A score that is the dot product of a behaviour's rows and a query, which is made of the target's rows.

    Shards can search by it: a dot product is a sum over features, and each part can be made where the feature's row is.
    """

    def queries(self, target: Rows) -> Rows:
        """Make the queries that the behaviours' rows are multiplied by, with the dims of those rows.

        Args:
            target: rows of the targets' attention tables; a cross feature may have one row for all targets, (1, d).

        Returns:
            Queries (T, ...); of a feature with one row for all targets, one query, (1, d).
        """
        raise NotImplementedError

    def products(self, dim: int) -> int:
        """Multiplications for a (target, behaviour) pair whose rows have ``dim`` floats; plans of runs need it."""
        return dim

    def forward(self, target: Rows, behaviors: Rows) -> Tensor:
        """Score K behaviours for each target.

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
        """Divide each part of the targets' rows by the root of its dim."""
        # The target's row is scaled, not the score: it is one row instead of N scores, and a shard need not know of it.
        return target.map(lambda rows_Td: rows_Td * rows_Td.shape[-1] ** -0.5)


class MappedScore(nn.Module):
    """The scaled dot product of mapped rows, with a map for targets and a map for behaviours; each may be an MLP."""

    def __init__(self, of_target: RowsMap, of_behavior: RowsMap) -> None:
        super().__init__()
        self.of_target, self.of_behavior = of_target, of_behavior
        self.scaled = ScaledDotProduct()

    def products(self, dim: int) -> int:
        """Multiplications for a pair, in which the behaviour is mapped; plans of runs need it."""
        return sum(weight.numel() for weight in self.of_behavior.parameters()) + dim

    def forward(self, target: Rows, behaviors: Rows) -> Tensor:
        """Scores of K behaviours for each target, float32 (T, K); arguments as of `DotProduct.forward`."""
        score_TK: Tensor = self.scaled(self.of_target(target), self.of_behavior(behaviors))
        return score_TK


class MappedDotProduct(DotProduct, MappedScore):
    """The scaled dot product of linearly mapped rows: ``<A e_i + a, B v_t + b>``.

    It is computed as ``<e_i, A^T (B v_t + b)> + <a, B v_t + b>``, in which no behaviour is mapped: for long histories
    that would take the most memory and time. The second part is the same for all behaviours of a target, so a search
    needs the first alone, which is a `DotProduct`.
    """

    def forward(self, target: Rows, behaviors: Rows) -> Tensor:
        """Scores of K behaviours for each target, float32 (T, K); arguments as of `DotProduct.forward`."""
        mapped = self.scaled.queries(self.of_target(target))
        score_TK = product(self.of_behavior.transposed(mapped), behaviors)
        return score_TK + self.of_behavior.bias_product(mapped).unsqueeze(1)

    def queries(self, target: Rows) -> Rows:
        """Make the queries ``A^T (B v_t + b)``, which rank the behaviours as the whole score ranks them."""
        return self.of_behavior.transposed(self.scaled.queries(self.of_target(target)))


class DinScore(nn.Module):
    """An MLP of ``[q, k, q - k, q * k]``, all over their dim (DIN, arXiv 1706.06978; DARE's authors' code)."""

    HIDDEN = 36
    """Hidden units."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4 * dim, self.HIDDEN), nn.PReLU(init=0.1), nn.Linear(self.HIDDEN, 1))

    def products(self, dim: int) -> int:
        """Multiplications for a pair whose rows have ``dim`` floats; plans of runs need it."""
        return self.HIDDEN * (dim + 1)

    def forward(self, target: Rows, behaviors: Rows) -> Tensor:
        """Scores of K behaviours for each target, float32 (T, K); arguments as of `DotProduct.forward`."""
        first, *others = self.layers
        assert isinstance(first, nn.Linear)
        query_TE, key_TKE = target.concatenated(), behaviors.concatenated()
        # The first layer's weights are cut into the four parts of [q, k, q - k, q * k], so that these are never laid
        # side by side: W [q, k, q - k, q * k] = (W_q + W_-) q + (W_k - W_-) k + W_* (q * k). With many behaviours, the
        # two matrices that k meets become one of the target's own, so that each behaviour is multiplied once.
        of_query, of_key, of_difference, of_product = first.weight.chunk(4, dim=1)
        per_target = linear(query_TE, of_query + of_difference).unsqueeze(1)
        # A program that is exported has one way for any number of behaviours.
        if torch.compiler.is_exporting() or key_TKE.shape[1] > self.HIDDEN:
            matrix_TEh = (of_key - of_difference).T + query_TE.unsqueeze(2) * of_product.T
            per_pair = torch.bmm(key_TKE, matrix_TEh)
        else:
            per_pair = linear(key_TKE, of_key - of_difference) + linear(query_TE.unsqueeze(1) * key_TKE, of_product)
        # Divided after the product, before the bias: the input is over its dim, the bias is not.
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
        """Scores of K behaviours for each target, float32 (T, H, K); arguments as of `DotProduct.forward`."""
        query_THd = self.of_target(target.concatenated()).unflatten(1, (self.heads, self.head_dim))
        # <q, B_h e> = <B_h^T q, e>: mapping the query in place of the behaviours maps 1 row instead of K.
        matrix_HdE = self.of_behavior.weight.unflatten(0, (self.heads, self.head_dim))
        query_THE = torch.einsum("thd,hde->the", query_THd, matrix_HdE) * self.head_dim**-0.5
        return torch.bmm(query_THE, behaviors.concatenated().transpose(1, 2))


def product(query: Rows, behaviors: Rows) -> Tensor:
    """Dot products over all features, float32 (T, K), of queries (T, ...) with K behaviours of each (T, K, ...)."""
    if isinstance(behaviors, IndexedBehaviors):
        return _indexed_product(query, behaviors)
    score_TK = _dot(behaviors.inherent, query.inherent)
    for feature, rows_TKd in behaviors.cross.items():
        score_TK = score_TK + _dot(rows_TKd, query.cross[feature])
    return score_TK


def _indexed_product(query: Rows, behaviors: IndexedBehaviors) -> Tensor:
    # Rows of the inherent features lie apart.
    queries = query.by_feature(
        {feature: rows.rows_Ld.shape[1] for feature, rows in behaviors.inherent_features.items()}
    )
    parts = [
        row_products.dot(queries[feature].expand(rows.index_X.shape[0], -1), *rows)
        for feature, rows in behaviors.features.items()
    ]
    return sum(parts[1:], start=parts[0])


def _dot(rows_TKD: Tensor, query_TD: Tensor) -> Tensor:
    # A cross feature has one query for all targets, which `expand` repeats without copying.
    return torch.bmm(rows_TKD, query_TD.expand(rows_TKD.shape[0], -1).unsqueeze(2)).squeeze(2)


def attention_weights(score_TK: Tensor, valid_TK: Tensor) -> Tensor:
    """Attention weights: the softmax of the scores over the valid behaviours alone; all 0 for a target without any.

    Args:
        score_TK: float32 (T, K), or (T, H, K).
        valid_TK: bool.

    Returns:
        float32, of the shape of the scores.
    """
    valid = valid_TK if score_TK.dim() == 2 else valid_TK.unsqueeze(1)
    masked = score_TK.masked_fill(~valid, -torch.inf)
    # The softmax of -inf alone is NaN, in the backward pass too: a target without behaviours gets scores of 0 instead.
    any_of_them = valid.any(dim=-1, keepdim=True)
    return masked.masked_fill(~any_of_them, 0).softmax(dim=-1) * valid
