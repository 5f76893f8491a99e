"""The folder of an experiment: whose it is, and that one runner at a time works in it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import OmegaConf

from pipeline.run_folder import write_whole
from schemas.experiment import ExperimentSettings
from schemas.settings import load_settings

SETTINGS = "experiment.yaml"


@contextmanager
def held(out: Path, experiment: ExperimentSettings) -> Iterator[None]:
    """Hold the folder until the block or the process ends; a new one gets the experiment's settings.

    Raises:
        ValueError: another runner holds it, or it is something else's, or another experiment's.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; --out names a folder")
    file = out / SETTINGS
    if out.is_dir() and any(out.iterdir()) and not file.is_file():
        raise ValueError(f"{out} is not empty and not the folder of an experiment; choose another one")
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is running the experiment in {out}; wait for it or stop it") from None
        begun = file.is_file() and (out / "runs").is_dir()  # else it was refused before anything ran
        former = load_settings(ExperimentSettings, [file]).name if begun else experiment.name
        if former != experiment.name:
            raise ValueError(f"{out} holds the experiment {former}, not {experiment.name}; choose another folder")
        if not file.is_file():
            write_settings(out, experiment)
        yield
    finally:
        os.close(handle)


def write_settings(out: Path, experiment: ExperimentSettings) -> None:
    """Write the experiment's settings into its folder."""
    content = OmegaConf.create(experiment.model_dump(mode="json", exclude_none=True))
    write_whole(out / SETTINGS, OmegaConf.to_yaml(content))
