"""The models by name, and how one is built from settings."""

import torch

from embeddings.model import CtrModel
from embeddings.models.dare import Dare, DareThreeTables, DareWithoutProduct
from embeddings.models.din import Din, DinShort
from embeddings.models.eta import Eta
from embeddings.models.sdim import Sdim
from embeddings.models.sim import SimHard, SimSoft
from embeddings.models.twin import (
    Twin,
    TwinDuplicated,
    TwinFourTables,
    TwinGradientNormalization,
    TwinHard,
    TwinV2,
    TwinWithoutProduct,
)
from embeddings.models.twin_projections import (
    TwinMLP1,
    TwinMLP2,
    TwinProjection,
    TwinProjectionCategory,
    TwinProjectionItem,
    TwinProjectionNoItem,
    TwinProjectionPosition,
    TwinProjectionShared,
    TwinProjectionSmall,
)
from embeddings.sizes import DataSizes
from schemas.errors import UserError
from schemas.model import ModelSettings

MODELS: dict[str, type[CtrModel]] = {
    "dare": Dare,
    "dare-no-tr": DareWithoutProduct,
    "dare-three-tables": DareThreeTables,
    "twin": Twin,
    "twin-4e": TwinFourTables,
    "twin-no-tr": TwinWithoutProduct,
    "twin-hard": TwinHard,
    "twin-v2": TwinV2,
    "twin-projection": TwinProjection,
    "twin-projection-shared": TwinProjectionShared,
    "twin-projection-no-item": TwinProjectionNoItem,
    "twin-projection-position": TwinProjectionPosition,
    "twin-projection-category": TwinProjectionCategory,
    "twin-projection-item": TwinProjectionItem,
    "twin-projection-small": TwinProjectionSmall,
    "twin-mlp-1": TwinMLP1,
    "twin-mlp-2": TwinMLP2,
    "twin-gradient-normalization": TwinGradientNormalization,
    "twin-duplicated": TwinDuplicated,
    "din": Din,
    "din-short": DinShort,
    "eta": Eta,
    "sdim": Sdim,
    "sim-hard": SimHard,
    "sim-soft": SimSoft,
}
"""``model.name`` -> class."""


def build_model(
    settings: ModelSettings,
    sizes: DataSizes,
    table_device: torch.device = torch.device("cpu"),  # noqa: B008
) -> CtrModel:
    """Build the model that the settings describe; `embeddings.initialization.initialize` draws its weights.

    Args:
        settings: what the model computes.
        sizes: of the data.
        table_device: where its tables are; ``meta`` for a model that will be sharded, or only planned.

    Raises:
        UserError: an unknown model, settings that the model or the data does not fit.
    """
    if settings.name not in MODELS:
        raise UserError(f"model.name: must be one of {', '.join(sorted(MODELS))} (not {settings.name!r})")
    if set(settings.retrieved) != set(sizes.lengths):
        raise UserError(
            f"model.retrieved: must name the stream's sequences, {', '.join(sizes.lengths)} "
            f"(not {', '.join(settings.retrieved)})"
        )
    return MODELS[settings.name](settings, sizes, table_device)
