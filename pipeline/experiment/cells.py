"""The cells of an experiment: data set x model x dim x seed, each a run of `dare train` in a folder of its own."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from pipeline.run_folder import RunFolder, read_json
from schemas.experiment import ExperimentSettings, ModelRow, folder_name
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
        ValueError: settings that no run can have; names the row.
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
                        raise ValueError(f"models.{label}, d {dim}: {error}") from None
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
        ValueError: a cell was begun with other settings or another data set.
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
            raise ValueError(
                f"{cell}: it was run with other settings: {reason or 'another data set'}; "
                f"remove {cell.folder} to run it anew, or choose another --out"
            )
