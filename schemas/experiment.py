"""Settings of an experiment: models x dims x seeds x data sets, each combination a training run."""

import re
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from schemas.model import Dim
from schemas.settings import Seed, Settings
from schemas.synth import SynthSettings

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
"""The name of an experiment or of a data set, and of its folder."""

Paper = dict[Name, dict[int, float]]
"""Published test AUC, by data set and dim."""


class DataSource(Settings):
    """Where a data set comes from: exactly one of ``folder``, ``preset`` and ``synth``; ``--data`` replaces it."""

    folder: str | None = None
    """Data set that ``dare prepare`` wrote."""
    preset: str | None = None
    """Prepared with this preset of ``dare prepare``, in the experiment's folder."""
    synth: SynthSettings | None = None
    """Generated, then prepared with the preset ``generic``."""
    prepare: tuple[str, ...] = ()
    """Settings of ``dare prepare``, as key=value, beside the preset's."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("folder", "preset", "synth") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of folder, preset and synth (not {', '.join(given) or 'none'})")
        if self.folder is not None and self.prepare:
            raise ValueError("prepare goes with preset or synth; a folder is prepared already")
        return self


class ModelRow(Settings):
    """A row of the table; its label is its key."""

    model: str
    """``model.name``."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of ``dare train`` that this row has of its own, nested as in a file; they win over ``dims``."""
    paper: Paper = Field(default_factory=dict)
    """Published AUC, shown beside what is measured."""


class ExperimentSettings(Settings):
    """Everything that decides what ``dare experiment`` runs."""

    name: Name
    extends: tuple[str, ...] = ()
    """Settings files, sought beside this one, that this one is laid over."""
    data: dict[Name, DataSource] = Field(min_length=1)
    recipe: str | None = None
    """A shipped recipe of ``dare train``, or a file that is sought beside the experiment's; all runs share it."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of ``dare train`` that all runs share, nested as in a file; they win over the recipe."""
    models: dict[str, ModelRow] = Field(min_length=1)
    """Rows by label, in the order of the table."""
    dims: tuple[Dim, ...] = Field(min_length=1)
    """Each of them in turn is ``model.attention.dim`` and ``model.representation.dim``, of every feature."""
    seeds: tuple[Seed, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _cells_differ(self) -> Self:
        # Two labels may differ and still be the same folder, "TWIN (hard)" and "TWIN hard": their runs would be mixed
        # up.
        folders = [folder_name(label) for label in self.models]
        named = ("dims", self.dims), ("seeds", self.seeds), ("the labels of models, as folders,", folders)
        for key, values in named:
            twice = [value for index, value in enumerate(values) if value in values[:index]]
            if twice:
                raise ValueError(f"{key} must not repeat {twice[0]!r}")
        if not all(folders):
            raise ValueError("models: a label must have a letter or a digit")
        return self


def folder_name(label: str) -> str:
    """A row's label as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


class Floor(Settings):
    """What a model is expected to reach."""

    auc: float = Field(gt=0, le=1)
    """Test AUC, the mean over seeds."""
    tolerance: float = Field(gt=0, lt=1)
    """How much lower it may be."""


class AccuracyFloor(Settings):
    """The test AUC that an experiment is expected to reach."""

    experiment: Name
    floors: dict[Name, dict[int, dict[str, Floor]]]
    """Floors by data set, dim and label."""
