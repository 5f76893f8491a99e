"""The models, by name."""

import torch

from embeddings.model import CtrModel
from embeddings.models.dare import Dare
from embeddings.models.twin import Twin
from embeddings.sizes import DataSizes
from schemas.model import ModelSettings

MODELS: dict[str, type[CtrModel]] = {"dare": Dare, "twin": Twin}
"""``model.name`` -> class."""


def build_model(
    settings: ModelSettings,
    sizes: DataSizes,
    table_device: torch.device = torch.device("cpu"),  # noqa: B008
) -> CtrModel:
    """The model that the settings describe, for data of these sizes; see `embeddings.initialization` for its weights.

    Args:
        settings: what the model computes.
        sizes: of the data.
        table_device: where its tables are; ``meta`` for a model that will be sharded, or only planned.

    Raises:
        ValueError: an unknown model, settings that the model or the data does not fit.
    """
    if settings.name not in MODELS:
        raise ValueError(f"model.name: must be one of {', '.join(sorted(MODELS))} (not {settings.name!r})")
    if set(settings.retrieved) != set(sizes.lengths):
        raise ValueError(
            f"model.retrieved: must name the stream's sequences, {', '.join(sizes.lengths)} "
            f"(not {', '.join(settings.retrieved)})"
        )
    return MODELS[settings.name](settings, sizes, table_device)
