"""The models of an experiment, built on meta tables: that they can be, and how many parameters they have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from embeddings.models import MODELS, build_model
from embeddings.sharding import check_tables
from embeddings.sizes import DataSizes
from pipeline.experiment.cells import Cell
from schemas.manifest import Manifest


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights."""

    tables: int
    dense: int


def check_names(cells: Sequence[Cell]) -> None:
    """All models must be known.

    Raises:
        ValueError: one is not; lists those that are.
    """
    for cell in cells:
        if cell.settings.model.name not in MODELS:
            raise ValueError(
                f"{cell.label}: model must be one of {', '.join(sorted(MODELS))} (not {cell.settings.model.name!r})"
            )


def parameters_of(
    cells: Sequence[Cell], manifests: Mapping[str, Manifest], device: str
) -> dict[tuple[str, str, int], Parameters]:
    """By data set, label and dim.

    Args:
        cells: of the experiment.
        manifests: of the data sets, by name.
        device: that the cells will be trained on, ``cpu`` or ``cuda``.

    Raises:
        ValueError: a model that does not fit the data, its settings or the device.
    """
    found: dict[tuple[str, str, int], Parameters] = {}
    for cell in cells:
        key = cell.data, cell.label, cell.dim
        if key in found:
            continue
        try:
            sizes = DataSizes.of(manifests[cell.data], cell.settings.stream)
            model = build_model(cell.settings.model, sizes, torch.device("meta"))
            check_tables(model, device)
        except ValueError as error:
            raise ValueError(f"{cell}: {error}") from None
        tables = sum(weight.numel() for weight in model.tables.parameters())
        found[key] = Parameters(tables, sum(weight.numel() for weight in model.parameters()) - tables)
    return found
