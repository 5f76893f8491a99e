"""Settings of `dare online`, and what it writes down of each day."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from schemas.errors import UserError
from schemas.settings import Settings, load_settings
from schemas.train import MAY_CHANGE, TrainSettings, differing

WHOLE = "all"
"""The segment of all targets."""

Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
"""One name, or a list of them."""


class _Online(Settings):
    days: Names = ()
    """Folders of the days' data sets, the first day first; or patterns, whose folders come in the order of the chain.
    Paths are relative to the working directory."""
    first: str | None = None
    """Folder of a run that was trained on the day before the first one; None: the first day is learnt from the
    beginning, and nothing is measured on it before."""
    keep_days: Annotated[int, Field(ge=1, le=1_000_000)] = 2
    """Checkpoints of how many of the last days stay."""


class OnlineFile(_Online):
    """The file that `dare online` is given."""

    config: Names = ()
    """YAML files of settings of ``dare train``, which ``train`` is laid over."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Settings of ``dare train``, nested as in a file; ``epochs`` is 1 unless it is said."""


class OnlineSettings(_Online):
    """All that decides what `dare online` computes, except what data arrive."""

    train: TrainSettings
    """Settings of each day's run."""


ONLINE_MAY_CHANGE = frozenset(
    ["days", "keep_days", *(f"train.{key}" for key in MAY_CHANGE if key not in ("epochs", "validation.patience"))]
)
"""Settings that may differ when the same command goes on; of those of ``train``, see `schemas.train.MAY_CHANGE`."""


def load_online(file: Path, overrides: Sequence[str] = ()) -> OnlineSettings:
    """Read the settings of `dare online`.

    Args:
        file: YAML, see `OnlineFile`.
        overrides: ``key=value``, where settings of ``dare train`` are below ``train``.

    Raises:
        UserError: a file is not there, or its settings are impossible.
    """
    said = load_settings(OnlineFile, [file], overrides)
    try:
        train = load_settings(TrainSettings, [{"epochs": 1}, *map(Path, said.config), said.train])
    except UserError as error:
        raise UserError(f"{file}: train: {error}") from None
    return OnlineSettings(**said.model_dump(include=set(_Online.model_fields)), train=train)


def refuse_changed(settings: OnlineSettings, former: OnlineSettings, folder: Path) -> None:
    """Make sure that an online run goes on with the settings that it was begun with.

    Raises:
        UserError: others differ than those of `ONLINE_MAY_CHANGE`; names them.
    """
    changed = {key: both for key, both in differing(settings, former).items() if key not in ONLINE_MAY_CHANGE}
    if changed:
        differences = ", ".join(f"{key} is {now!r}, was {before!r}" for key, (now, before) in changed.items())
        raise UserError(
            f"{folder}: begun with other settings: {differences}; use the same to go on, or another folder to begin "
            "anew"
        )


class LearntDay(BaseModel):
    """What is written down of a day that is done."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Name of the data set's folder, and of the run's."""
    number: int
    """In the chain, from 0."""
    fingerprint: str
    """SHA-256 of the data set's manifest."""
    chain: str
    """The fingerprint of the chain's day 0."""
    first_timestamp: int
    """The day's earliest moment, in seconds."""
    last_timestamp: int
    targets: int
    skipped: bool = False
    """Nothing was learnt: the day has no targets."""
    seconds: float = 0.0
    """From the day's beginning to its end, in the start of the program that has ended it."""
    before: dict[str, dict[str, dict[str, float | int | None]]] | None = None
    """By task and segment, the metrics of the model that had not learnt the day; None: there was no model yet."""
