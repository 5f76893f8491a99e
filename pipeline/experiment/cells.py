"""The cells of an experiment: data set x model x dim x seed, each a run of `dare train` in a folder of its own.

Before anything runs, the models of the cells are built on meta tables, to see that they can be and to count parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from embeddings.models import MODELS, build_model
from embeddings.sharding import check_tables
from embeddings.sizes import DataSizes
from pipeline.runs.run_folder import RunFolder
from schemas.errors import UserError
from schemas.experiment import ExperimentSettings, ModelRow, folder_name
from schemas.manifest import Manifest
from schemas.settings import load_settings, refuse_flat_sections
from schemas.train import TrainSettings, differing

MAY_DIFFER = ("checkpoint.every", "checkpoint.keep", "stream.threads", "stream.prefetch_batches")
"""Settings that change no result; a cell that was trained with others is not run again."""


@dataclass(frozen=True)
class Cell:
    """One training run of an experiment."""

    data: str
    label: str
    dim: int
    seed: int
    settings: TrainSettings
    folder: Path
    """Folder of the run; what else is known of the cell lies in files beside it."""

    def __str__(self) -> str:
        return f"{self.data}, {self.label}, d {self.dim}, seed {self.seed}"

    @property
    def run(self) -> RunFolder:
        """The run that is trained in the cell's folder."""
        return RunFolder(self.folder)

    @property
    def scores(self) -> Path:
        """Folder of the predictions of the test split."""
        return self.folder / "scores"

    @property
    def settings_file(self) -> Path:
        """All settings of the run, for ``dare train --config``."""
        return self.folder.with_suffix(".yaml")

    @property
    def log(self) -> Path:
        """File of what ``dare train`` said, one start after another."""
        return self.folder.with_suffix(".log")

    @property
    def record(self) -> Path:
        """JSON file of the cell's seconds, memory and error."""
        return self.folder.with_suffix(".json")

    @property
    def finished(self) -> bool:
        """Whether the best checkpoint is tested and the predictions are there."""
        return self.run.test_file.is_file() and self.scores.is_dir()


def cells_of(experiment: ExperimentSettings, recipe: Path | None, out: Path) -> list[Cell]:
    """All cells of an experiment, with seeds outermost: a whole table with the first seed comes before the second.

    Args:
        experiment: its settings.
        recipe: file of the settings that all cells share.
        out: folder of the experiment.

    Raises:
        UserError: settings that no run can have; the message names the row.
    """
    refuse_flat_sections(TrainSettings, experiment.settings, "settings.")
    for label, row in experiment.models.items():
        refuse_flat_sections(TrainSettings, row.settings, f"models.{label}: settings.")
    cells = []
    for seed in experiment.seeds:
        for data in experiment.data:
            for dim in experiment.dims:
                for label, row in experiment.models.items():
                    folder = out / "runs" / data / folder_name(label) / f"d{dim}" / f"s{seed}"
                    try:
                        settings = _settings(experiment, recipe, row, dim, seed)
                    except (UserError, OmegaConfBaseException) as error:
                        raise UserError(f"models.{label}, d {dim}: {' '.join(str(error).split())}") from None
                    cells.append(Cell(data, label, dim, seed, settings, folder))
    return cells


def _settings(experiment: ExperimentSettings, recipe: Path | None, row: ModelRow, dim: int, seed: int) -> TrainSettings:
    # Later ones win: a row may set dims of its own, but neither another model's name nor a seed.
    merged = OmegaConf.merge(
        experiment.settings,
        {"model": {"attention": {"dim": dim}, "representation": {"dim": dim}}},
        row.settings,
        {"model": {"name": row.model}, "seed": seed},
    )
    values = OmegaConf.to_container(merged)
    assert isinstance(values, dict)
    return load_settings(TrainSettings, [recipe] if recipe else [], values={str(k): v for k, v in values.items()})


def refuse_changed(cells: list[Cell], fingerprints: dict[str, str]) -> None:
    """Make sure that the cells that have begun are those that would be run now.

    Args:
        cells: of the experiment.
        fingerprints: of the data sets, by name.

    Raises:
        UserError: a cell has begun with other settings or another data set.
    """
    for cell in cells:
        # Killed before it had written both: nothing to compare, it begins anew.
        if not (cell.run.settings_file.is_file() and cell.run.data_file.is_file()):
            continue
        changed = {
            key: values
            for key, values in differing(cell.settings, cell.run.settings()).items()
            if key not in MAY_DIFFER
        }
        trained_on = cell.run.data_record()["fingerprint"]
        if changed or trained_on != fingerprints[cell.data]:
            reason = ", ".join(f"{key} is {now!r}, was {before!r}" for key, (now, before) in changed.items())
            raise UserError(
                f"{cell}: it was run with other settings: {reason or 'another data set'}; "
                f"remove {cell.folder} to run it anew, or choose another --out"
            )


@dataclass(frozen=True)
class Parameters:
    """How many weights a model has."""

    tables: int
    """Weights of all embedding tables."""
    dense: int
    """All other weights."""


def check_names(cells: Sequence[Cell]) -> None:
    """Make sure that the program has the models of all cells.

    Raises:
        UserError: it has not; the message lists those that it has.
    """
    for cell in cells:
        if cell.settings.model.name not in MODELS:
            raise UserError(
                f"{cell.label}: model must be one of {', '.join(sorted(MODELS))} (not {cell.settings.model.name!r})"
            )


def parameters_of(
    cells: Sequence[Cell], manifests: Mapping[str, Manifest], device: str
) -> dict[tuple[str, str, int], Parameters]:
    """Count the parameters of all models, and so make sure that each can be built.

    Args:
        cells: of the experiment.
        manifests: of the data sets, by name.
        device: that the cells will be trained on, ``cpu`` or ``cuda``.

    Returns:
        Parameters by data set, label and dim; they do not depend on the seed.

    Raises:
        UserError: a model does not fit the data, its settings or the device.
    """
    parameters: dict[tuple[str, str, int], Parameters] = {}
    for cell in cells:
        key = cell.data, cell.label, cell.dim
        # A model is built once for all seeds.
        if key in parameters:
            continue
        try:
            sizes = DataSizes.of(manifests[cell.data], cell.settings.stream)
            model = build_model(cell.settings.model, sizes, torch.device("meta"))
            check_tables(model, device)
        except UserError as error:
            raise UserError(f"{cell}: {error}") from None
        tables = sum(weight.numel() for weight in model.tables.parameters())
        parameters[key] = Parameters(tables, sum(weight.numel() for weight in model.parameters()) - tables)
    return parameters
