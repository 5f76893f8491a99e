"""TWIN with maps between the shared tables and their uses: decouplings that fail (DARE, section 2.3 and appendix C)."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from embeddings.features import Rows
from embeddings.layers.pooling import pooled
from embeddings.layers.projections import RowsMap
from embeddings.layers.scoring import MappedDotProduct, MappedScore
from embeddings.models.twin import Twin
from schemas.errors import UserError
from schemas.model import CROSS, INHERENT, Feature


class TwinProjection(Twin):
    """TWIN whose shared rows pass four linear maps: of target and behaviour, for attention and representation."""

    mapped: ClassVar[Sequence[Feature]] = (*INHERENT, *CROSS)
    """Features whose rows the maps mix; the others stay as they are."""
    shared: ClassVar[bool] = False
    """Target and behaviour have the same maps."""
    hidden: ClassVar[int] = 0
    """Hidden layers of each map."""
    output_dim: ClassVar[int | None] = None
    """Dim of each feature after the maps; None: as before."""

    def make_scoring(self) -> nn.Module:
        """The dot product of mapped rows; if the maps are linear, shards can search by it."""
        return (MappedScore if self.hidden else MappedDotProduct)(*self._maps())

    def make_modules(self) -> None:
        """The maps for representation."""
        self.target_map, self.behavior_map = self._maps()

    def represent(self, target: Rows, behaviors: Rows) -> tuple[Rows, Rows]:
        """The target's rows mapped; the behaviours' are in `pool`."""
        return self.target_map(target), behaviors

    def pool(self, weight_TK: Tensor, behaviors: Rows) -> Rows:
        """``sum_i w_i map(e_i)``; if the map is linear, of the sum."""
        if self.hidden:
            return pooled(weight_TK, self.behavior_map(behaviors))
        return self.behavior_map.of_sum(pooled(weight_TK, behaviors), weight_TK.sum(1))

    def represented_dims(self) -> dict[Feature, int]:
        """Dims of mapped rows."""
        return self.target_map.outputs

    def _maps(self) -> tuple[RowsMap, RowsMap]:
        dims = super().represented_dims()
        missing = [feature for feature in self.mapped if feature not in dims]
        if self.mapped is not TwinProjection.mapped and missing:
            raise UserError(f"model.features: {self.settings.name} maps {missing[0]}; add it to the features")
        outputs = {feature: self.output_dim or dim for feature, dim in dims.items()}
        of_target = RowsMap(dims, self.mapped, outputs, self.hidden)
        return of_target, of_target if self.shared else RowsMap(dims, self.mapped, outputs, self.hidden)


class TwinProjectionShared(TwinProjection):
    """Two linear maps: one for attention, one for representation, of targets and behaviours alike."""

    shared = True


class TwinMLP1(TwinProjection):
    """Maps with one hidden layer in place of the linear ones."""

    searched = "local"
    hidden = 1


class TwinMLP2(TwinProjection):
    """Maps with two hidden layers."""

    searched = "local"
    hidden = 2


class TwinProjectionNoItem(TwinProjection):
    """Linear maps of category and position alone; item rows stay shared."""

    mapped = ("category", "position")


class TwinProjectionPosition(TwinProjection):
    """Linear maps of position alone."""

    mapped = ("position",)


class TwinProjectionCategory(TwinProjection):
    """Linear maps of category alone."""

    mapped = ("category",)


class TwinProjectionItem(TwinProjection):
    """Linear maps of item alone."""

    mapped = ("item",)


class TwinProjectionSmall(TwinProjection):
    """Linear maps from large rows to 16 floats of each feature."""

    output_dim = 16
