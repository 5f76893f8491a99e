"""Projections of embedding rows: learned ones, which try to make one set of tables serve two ends, and random ones.

F = features mapped together, T = targets, I, O = dims of the mapped features together, before and after, d = dim of one
feature, D = dim of the inherent features together, B = bits of a signature, X = any shape.
"""

from collections.abc import Callable, Collection, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from embeddings.features import Rows
from schemas.model import Feature


class RowsMap(nn.Module):
    """A linear map, or an MLP, of some features' rows side by side; the other features stay as they are.

    Args:
        inherent: dims of the inherent features.
        cross: dims of the cross features.
        mapped: those of both that are mapped together.
        outputs: their dims afterwards.
        hidden: hidden layers, each as wide as the input; 0: a linear map.
        bias: the last layer adds one.
    """

    def __init__(
        self,
        inherent: Mapping[Feature, int],
        cross: Mapping[Feature, int],
        mapped: Collection[Feature],
        outputs: Mapping[Feature, int],
        hidden: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self._inherent, dims = tuple(inherent), {**inherent, **cross}
        # In the order of ``dims``, not of ``mapped``: rows are split and joined in that order.
        self.dims, self.mapped = dims, tuple(feature for feature in dims if feature in mapped)
        self.outputs = {feature: outputs[feature] if feature in mapped else dim for feature, dim in dims.items()}
        wide = sum(dims[feature] for feature in self.mapped)
        layers: list[nn.Module] = []
        for before, after in pairwise([wide] * (hidden + 1)):
            # A hidden layer is as wide as the input. Without hidden layers the loop is empty, and the map is one linear
            # layer.
            layers += [nn.Linear(before, after), nn.PReLU(init=0.1)]
        layers.append(nn.Linear(wide, sum(self.outputs[feature] for feature in self.mapped), bias=bias))
        self.layers = nn.Sequential(*layers)

    def forward(self, rows: Rows) -> Rows:
        """Map rows (..., d) of targets or behaviours to rows with the dims of ``outputs``."""
        return self._through(rows, self.dims, self.outputs, self.layers)

    def transposed(self, rows: Rows) -> Rows:
        """Map rows with the dims of ``outputs`` back by the transpose of a linear map, without its bias."""
        linear = self._linear()
        # The weight of a linear layer is (out, in), so from the right it is its own transpose: ``A^T y``.
        return self._through(rows, self.outputs, self.dims, lambda mapped_XO: mapped_XO @ linear.weight)

    def of_sum(self, rows: Rows, weight_T: Tensor) -> Rows:
        """Map weighted sums of rows: ``sum_i w_i (A e_i + a) = A sum_i w_i e_i + a sum_i w_i``, for a linear map.

        Args:
            rows: the sums, (T, ...).
            weight_T: the sums of the weights.
        """
        linear = self._linear()
        bias_TO = 0 if linear.bias is None else weight_T.unsqueeze(1) * linear.bias
        return self._through(rows, self.dims, self.outputs, lambda sum_TI: sum_TI @ linear.weight.T + bias_TO)

    def bias_product(self, rows: Rows) -> Tensor:
        """Multiply rows (..., d) with the dims of ``outputs`` by a linear map's bias: dot products, float32 (...)."""
        linear = self._linear()
        mapped_XO = self._side_by_side(self._by_feature(rows, self.outputs))
        return mapped_XO.new_zeros(mapped_XO.shape[:-1]) if linear.bias is None else mapped_XO @ linear.bias

    def _linear(self) -> nn.Linear:
        (linear,) = self.layers
        assert isinstance(linear, nn.Linear), "only of a linear map"
        return linear

    def _through(
        self,
        rows: Rows,
        before: Mapping[Feature, int],
        after: Mapping[Feature, int],
        layers: Callable[[Tensor], Tensor],
    ) -> Rows:
        parts = self._by_feature(rows, before)
        mapped = layers(self._side_by_side(parts)).split([after[feature] for feature in self.mapped], dim=-1)
        parts |= dict(zip(self.mapped, mapped, strict=True))
        inherent_XD = torch.cat([parts.pop(feature) for feature in self._inherent], dim=-1)
        return Rows(inherent_XD, parts)

    def _side_by_side(self, parts: Mapping[Feature, Tensor]) -> Tensor:
        """The mapped features' rows in one tensor; a feature with one row for all targets is repeated for each."""
        leading = torch.broadcast_shapes(*[parts[feature].shape[:-1] for feature in self.mapped])
        return torch.cat([parts[feature].expand(*leading, -1) for feature in self.mapped], dim=-1)

    def _by_feature(self, rows: Rows, dims: Mapping[Feature, int]) -> dict[Feature, Tensor]:
        return rows.by_feature({feature: dims[feature] for feature in self._inherent})


class Signature(nn.Module):
    """The signs of B random projections: rows that point the same way share many of them (SimHash).

    The directions are drawn with the first weights and never trained, so that equal rows keep equal signatures.
    """

    def __init__(self, dim: int, bits: int) -> None:
        super().__init__()
        # A linear layer, so that it is drawn with the others and saved; without a gradient, DDP and the optimizers
        # leave it alone.
        self.directions = nn.Linear(dim, bits, bias=False).requires_grad_(False)

    @torch.no_grad()
    def forward(self, rows_XD: Tensor) -> Tensor:
        """On which side of each direction's plane a row lies: bool (X, B)."""
        projected: Tensor = self.directions(rows_XD)
        return projected > 0
