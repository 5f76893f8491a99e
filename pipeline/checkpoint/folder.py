"""The checkpoints of a run: which there are, which is the last, which the best, which may go."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from pipeline.run_folder import read_json

RECORD = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole."""

    path: Path
    step: int
    score: float | None
    """The validation's metric where the model was validated at this step, and was better than ever before."""


def checkpoints_in(folder: Path) -> list[Checkpoint]:
    """All that are whole, by step.

    Raises:
        ValueError: one is damaged.
    """
    found = []
    for path in sorted(folder.glob("step-*")):
        record = read_json(path / RECORD)
        found.append(Checkpoint(path, record["step"], record["score"]))
    return found


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """The latest; None: there is none."""
    return next(reversed(checkpoints_in(folder)), None)


def best_checkpoint(folder: Path) -> Checkpoint | None:
    """The one of the best validation; None: no checkpoint has one."""
    scored = [checkpoint for checkpoint in checkpoints_in(folder) if checkpoint.score is not None]
    return max(scored, key=lambda checkpoint: checkpoint.score or 0.0, default=None)


def final_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, once it is whole."""
    return folder / f"step-{step:012}"


def partial_path(folder: Path, step: int) -> Path:
    """Where it is written."""
    return folder / f".step-{step:012}.partial"


def prune(folder: Path, keep: int) -> None:
    """Remove all but the last ``keep`` and the best."""
    kept = {checkpoint.path for checkpoint in checkpoints_in(folder)[-keep:]}
    best = best_checkpoint(folder)
    if best is not None:
        kept.add(best.path)
    for checkpoint in checkpoints_in(folder):
        if checkpoint.path not in kept:
            # Out of sight first: a folder that is removed by half must not be taken for a checkpoint.
            hidden = checkpoint.path.with_name(f".{checkpoint.path.name}.removed")
            checkpoint.path.rename(hidden)
            shutil.rmtree(hidden)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run was writing or removing."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path)
