"""Maps of embedding rows to other rows: the projections that try to make one set of tables serve two ends.

F = features mapped together, I, O = their dims before and after.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from embeddings.features import Rows
from schemas.model import INHERENT, Feature


class RowsMap(nn.Module):
    """A linear map, or a perceptron, of some features' rows side by side; the other features stay as they are.

    Args:
        dims: of all features, the inherent ones first.
        mapped: those that are mapped together.
        outputs: their dims afterwards.
        hidden: hidden layers, each as wide as the input; 0: a linear map.
        bias: the last layer adds one.
    """

    def __init__(
        self,
        dims: Mapping[Feature, int],
        mapped: Sequence[Feature],
        outputs: Mapping[Feature, int],
        hidden: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.dims, self.mapped = dict(dims), tuple(feature for feature in dims if feature in mapped)
        self.outputs = {feature: outputs[feature] if feature in mapped else dim for feature, dim in dims.items()}
        wide = sum(dims[feature] for feature in self.mapped)
        layers: list[nn.Module] = []
        for before, after in pairwise([wide] * (hidden + 1)):
            layers += [nn.Linear(before, after), nn.PReLU(init=0.1)]
        layers.append(nn.Linear(wide, sum(self.outputs[feature] for feature in self.mapped), bias=bias))
        self.layers = nn.Sequential(*layers)

    def forward(self, rows: Rows) -> Rows:
        """Rows (..., d) of the same targets or behaviours, with the dims of ``outputs``."""
        return self._through(rows, self.dims, self.outputs, self.layers)

    def transposed(self, rows: Rows) -> Rows:
        """What a linear map's transpose makes of rows with the dims of ``outputs``; without the bias."""
        (linear,) = self.layers
        assert isinstance(linear, nn.Linear), "a perceptron has no transpose"
        weight_OI = linear.weight
        return self._through(rows, self.outputs, self.dims, lambda mapped_XO: mapped_XO @ weight_OI)

    def of_sum(self, rows: Rows, weight_T: Tensor) -> Rows:
        """What a linear map makes of weighted sums of rows: ``sum_i w_i (A e_i + a) = A sum_i w_i e_i + a sum_i w_i``.

        Args:
            rows: the sums, (T, ...).
            weight_T: the sums of the weights.
        """
        (linear,) = self.layers
        assert isinstance(linear, nn.Linear), "a perceptron of a sum is no sum"
        bias_TO = 0 if linear.bias is None else weight_T.unsqueeze(1) * linear.bias
        return self._through(rows, self.dims, self.outputs, lambda sum_TI: sum_TI @ linear.weight.T + bias_TO)

    def bias_product(self, rows: Rows) -> Tensor:
        """The dot product of a linear map's bias with rows (..., d) of the dims of ``outputs``: float32 (...)."""
        (linear,) = self.layers
        assert isinstance(linear, nn.Linear), "a perceptron has more than one bias"
        mapped_XO = self._side_by_side(_by_feature(rows, self.outputs))
        return mapped_XO.new_zeros(mapped_XO.shape[:-1]) if linear.bias is None else mapped_XO @ linear.bias

    def _through(self, rows: Rows, before: Mapping[Feature, int], after: Mapping[Feature, int], layers: object) -> Rows:
        parts = _by_feature(rows, before)
        assert callable(layers)
        found = layers(self._side_by_side(parts)).split([after[feature] for feature in self.mapped], dim=-1)
        parts |= dict(zip(self.mapped, found, strict=True))
        inherent = [part for feature, part in parts.items() if feature in INHERENT]
        return Rows(torch.cat(inherent, dim=-1), {name: part for name, part in parts.items() if name not in INHERENT})

    def _side_by_side(self, parts: Mapping[Feature, Tensor]) -> Tensor:
        """The mapped features' rows; one row for all targets becomes as many as the others are."""
        leading = torch.broadcast_shapes(*[parts[feature].shape[:-1] for feature in self.mapped])
        return torch.cat([parts[feature].expand(*leading, -1) for feature in self.mapped], dim=-1)


def _by_feature(rows: Rows, dims: Mapping[Feature, int]) -> dict[Feature, Tensor]:
    inherent = [feature for feature in dims if feature in INHERENT]
    parts = rows.inherent.split([dims[feature] for feature in inherent], dim=-1)
    return {**dict(zip(inherent, parts, strict=True)), **rows.cross}
