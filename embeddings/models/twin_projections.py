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
from schemas.model import Feature


class TwinProjection(Twin):
    """TWIN whose shared rows pass four linear maps: of targets and of behaviours, for attention and representation.

    The maps mix the features that they map and keep their dims, so that the score has the same parts as TWIN's. They
    start as small as all linear layers of the authors' code, N(0, 0.01^2), which makes mapped rows very small at first.
    """

    mapped: ClassVar[Sequence[Feature] | None] = None
    """Features whose rows the maps mix, and the others stay as they are; None: all of them."""
    shared: ClassVar[bool] = False
    """Targets and behaviours have the same maps."""
    hidden: ClassVar[int] = 0
    """Hidden layers of each map."""
    output_dim: ClassVar[int | None] = None
    """Dim of each feature after the maps; None: as before."""

    def make_scoring(self) -> nn.Module:
        """Make the dot product of mapped rows; if the maps are linear, shards can search by it."""
        return (MappedScore if self.hidden else MappedDotProduct)(*self._maps(scored=True))

    def make_modules(self) -> None:
        """Make the maps for representation."""
        self.target_map, self.behavior_map = self._maps(scored=False)

    def represent(self, target: Rows, behaviors: Rows) -> tuple[Rows, Rows]:
        """Map the targets' rows; the behaviours' are mapped in `pool`."""
        return self.target_map(target), behaviors

    def pool(self, weight_TK: Tensor, behaviors: Rows) -> Rows:
        """Pool mapped rows, ``sum_i w_i map(e_i)``; a linear map is applied to the sum instead, once for K rows."""
        # An MLP of a sum is not the sum of the MLP's outputs, so each of the K rows is mapped.
        if self.hidden:
            return pooled(weight_TK, self.behavior_map(behaviors))
        return self.behavior_map.of_sum(pooled(weight_TK, behaviors), weight_TK.sum(1))

    def represented_dims(self) -> dict[Feature, int]:
        """Dims of the mapped rows."""
        return self.target_map.outputs

    def _maps(self, scored: bool) -> tuple[RowsMap, RowsMap]:
        # The dims of the rows as they are in the tables; `represented_dims` of this class are those after the maps.
        name = self.roles.target_representation
        inherent, cross = self.tables.inherent_dims(name, scored), self.tables.cross_dims(name, scored)
        dims = inherent | cross
        mapped = tuple(dims) if self.mapped is None else self.mapped
        for feature in mapped:
            # The plain model maps whatever features there are; one that is named after its features must have them.
            if feature not in dims:
                how = ", with attention" if feature in self.settings.feature_names else ""
                raise UserError(f"model.features: {self.settings.name} maps {feature}; add it to the features{how}")
        outputs = {feature: self.output_dim or dim for feature, dim in dims.items()}
        of_target = RowsMap(inherent, cross, mapped, outputs, self.hidden)
        return of_target, of_target if self.shared else RowsMap(inherent, cross, mapped, outputs, self.hidden)


class TwinProjectionShared(TwinProjection):
    """TWIN with two linear maps, one for attention and one for representation, of targets and behaviours alike."""

    shared = True


class TwinMLP1(TwinProjection):
    """TWIN with maps of one hidden layer in place of the linear ones; shards cannot search by their score."""

    searched = "local"
    hidden = 1


class TwinMLP2(TwinProjection):
    """TWIN with maps of two hidden layers; shards cannot search by their score."""

    searched = "local"
    hidden = 2


class TwinProjectionNoItem(TwinProjection):
    """TWIN with linear maps of category and position alone; item rows stay as they are."""

    mapped = ("category", "position")


class TwinProjectionPosition(TwinProjection):
    """TWIN with linear maps of position alone."""

    mapped = ("position",)


class TwinProjectionCategory(TwinProjection):
    """TWIN with linear maps of category alone."""

    mapped = ("category",)


class TwinProjectionItem(TwinProjection):
    """TWIN with linear maps of item alone."""

    mapped = ("item",)


class TwinProjectionSmall(TwinProjection):
    """TWIN with linear maps from large rows to 16 floats of each feature."""

    output_dim = 16
