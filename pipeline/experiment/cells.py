"""The cells of an experiment: data set x model x dim x seed, each a run of `dare train` in a folder of its own.

The models of an experiment, built on meta tables: that they can be, and how many parameters they have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf

from embeddings.models import MODELS, build_model
from embeddings.sharding import check_tables
from embeddings.sizes import DataSizes
from pipeline.files import read_json
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
    """One run."""

    data: str
    label: str
    dim: int
    seed: int
    settings: TrainSettings
    folder: Path
    """Of the run; what is known of the cell besides lies in files beside it."""

    def __str__(self) -> str:
        return f"{self.data}, {self.label}, d {self.dim}, seed {self.seed}"

    @property
    def run(self) -> RunFolder:
        """The run."""
        return RunFolder(self.folder)

    @property
    def scores(self) -> Path:
        """Predictions of the test split."""
        return self.folder / "scores"

    @property
    def settings_file(self) -> Path:
        """All settings of the run, for ``dare train --config``."""
        return self.folder.with_suffix(".yaml")

    @property
    def log(self) -> Path:
        """What ``dare train`` said, a start after the other."""
        return self.folder.with_suffix(".log")

    @property
    def record(self) -> Path:
        """Seconds, memory and the error; JSON."""
        return self.folder.with_suffix(".json")

    @property
    def finished(self) -> bool:
        """Tested, and the predictions are there."""
        return self.run.test_file.is_file() and self.scores.is_dir()


def cells_of(experiment: ExperimentSettings, recipe: Path | None, out: Path) -> list[Cell]:
    """All cells, whole tables first: every model with the first seed, then with the second.

    Args:
        experiment: its settings.
        recipe: file of the settings that all cells share.
        out: folder of the experiment.

    Raises:
        UserError: settings that no run can have; names the row.
    """
    refuse_flat_sections(TrainSettings, experiment.settings, "settings.")
    for label, row in experiment.models.items():
        refuse_flat_sections(TrainSettings, row.settings, f"models.{label}: settings.")
    found = []
    for seed in experiment.seeds:
        for data in experiment.data:
            for dim in experiment.dims:
                for label, row in experiment.models.items():
                    folder = out / "runs" / data / folder_name(label) / f"d{dim}" / f"s{seed}"
                    try:
                        settings = _settings(experiment, recipe, row, dim, seed)
                    except ValueError as error:
                        raise UserError(f"models.{label}, d {dim}: {error}") from None
                    found.append(Cell(data, label, dim, seed, settings, folder))
    return found


def _settings(experiment: ExperimentSettings, recipe: Path | None, row: ModelRow, dim: int, seed: int) -> TrainSettings:
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
    """What was run must be what would be run now.

    Args:
        cells: of the experiment.
        fingerprints: of the data sets, by name.

    Raises:
        UserError: a cell was begun with other settings or another data set.
    """
    for cell in cells:
        if not (cell.run.settings_file.is_file() and cell.run.data_file.is_file()):
            continue
        changed = {
            key: values
            for key, values in differing(cell.settings, cell.run.settings()).items()
            if key not in MAY_DIFFER
        }
        trained_on = read_json(cell.run.data_file).get("fingerprint")
        if changed or trained_on != fingerprints[cell.data]:
            reason = ", ".join(f"{key} is {now!r}, was {before!r}" for key, (now, before) in changed.items())
            raise UserError(
                f"{cell}: it was run with other settings: {reason or 'another data set'}; "
                f"remove {cell.folder} to run it anew, or choose another --out"
            )


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights."""

    tables: int
    dense: int


def check_names(cells: Sequence[Cell]) -> None:
    """All models must be known.

    Raises:
        UserError: one is not; lists those that are.
    """
    for cell in cells:
        if cell.settings.model.name not in MODELS:
            raise UserError(
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
        UserError: a model that does not fit the data, its settings or the device.
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
            raise UserError(f"{cell}: {error}") from None
        tables = sum(weight.numel() for weight in model.tables.parameters())
        found[key] = Parameters(tables, sum(weight.numel() for weight in model.parameters()) - tables)
    return found
