"""The checkpoints of a run: which there are, which may go, and loading one on any number of ranks.

A checkpoint is a folder that torch.distributed.checkpoint has written, ``step-000000000123``, with `RECORD` in it.
Names that begin with a dot are of checkpoints that are being written or removed.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_in_place

from pipeline.errors import is_lost_contact
from pipeline.files import read_json, remove_folder
from schemas.errors import UserError

RECORD = "checkpoint.json"
"""File that says of which step a checkpoint is and how good; see `Checkpoint`."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole: its folder, its step and its score."""

    path: Path
    step: int
    score: float | None
    """The metric of the validation at this step if the model was better than ever before, else None."""


def checkpoints_in(folder: Path) -> list[Checkpoint]:
    """Return all checkpoints that are whole, by step.

    Raises:
        UserError: the record of one is damaged.
    """
    checkpoints = []
    # Steps are written with leading zeros, so that the order of names is that of steps.
    for path in sorted(folder.glob("step-*")):
        record = read_json(path / RECORD)
        if not isinstance(record.get("step"), int) or "score" not in record:
            raise UserError(f"{path / RECORD} is damaged (no step or no score); remove the folder of this checkpoint")
        checkpoints.append(Checkpoint(path, record["step"], record["score"]))
    return checkpoints


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the checkpoint of the latest step, or None if there is none."""
    return next(reversed(checkpoints_in(folder)), None)


def best_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the checkpoint of the best validation, or None if no checkpoint has one."""
    scored = [checkpoint for checkpoint in checkpoints_in(folder) if checkpoint.score is not None]
    return max(scored, key=lambda checkpoint: checkpoint.score or 0.0, default=None)


def final_path(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step, once it is whole."""
    return folder / f"step-{step:012}"


def partial_path(folder: Path, step: int) -> Path:
    """Return the folder in which the checkpoint of a step is written until it is whole."""
    return folder / f".step-{step:012}.partial"


def prune(folder: Path, keep: int) -> None:
    """Remove all checkpoints but the last ``keep`` and the best."""
    # The best one stays whatever its age: the test, evaluation and scoring take it.
    kept = {checkpoint.path for checkpoint in checkpoints_in(folder)[-keep:]}
    best = best_checkpoint(folder)
    if best is not None:
        kept.add(best.path)
    for checkpoint in checkpoints_in(folder):
        if checkpoint.path not in kept:
            # Out of sight first: a folder that is removed by half must not be taken for a checkpoint.
            remove_folder(checkpoint.path)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run was writing or removing."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path)


def keys_in(checkpoint: Path) -> dict[str, tuple[int, ...] | None]:
    """Return the shapes of a checkpoint's entries by key; None for an entry that is not a tensor.

    Raises:
        UserError: the checkpoint is damaged.
    """
    try:
        # The metadata alone: shapes are compared before a single tensor is read.
        entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    except Exception as error:  # whatever unpickling a damaged file raises
        raise UserError(f"{checkpoint} cannot be read ({_line(error)}); use another checkpoint") from None
    return {key: tuple(kind.size) if isinstance(kind, TensorStorageMetadata) else None for key, kind in entries.items()}


def load(state: dict[str, Any], checkpoint: Path) -> None:
    """Load the values of ``state`` from ``checkpoint``: tensors in place, others replaced. All ranks must call it.

    Args:
        state: nested dictionaries, some or all of the top-level keys that were saved.
        checkpoint: folder of a checkpoint that any number of ranks have saved.

    Raises:
        UserError: the checkpoint has other keys or shapes, all of which are named; it is damaged.
    """
    # What is to be loaded against what is there, by torch.distributed.checkpoint's own flattened keys. Top-level parts
    # that the caller did not ask for do not count as differences.
    saved = {key: shape for key, shape in keys_in(checkpoint).items() if key.split(".")[0] in state}
    wanted = {key: _shape(value) for key, value in flatten_state_dict(dict(state))[0].items()}
    # Of the random states, a rank has its own alone.
    missing = [f"{key} is not in it" for key in wanted if key not in saved]
    extra = [f"{key} is not in the model" for key in saved if key not in wanted and not key.startswith("random.")]
    other = [
        f"{key} is {_times(saved[key])}, in the model {_times(shape)}"
        for key, shape in wanted.items()
        if key in saved and saved[key] != shape
    ]
    if differences := other + missing + extra:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise UserError(f"{checkpoint} is of another model: {'; '.join(differences[:5])}{more}")
    try:
        load_in_place(state, checkpoint_id=checkpoint)
    except (CheckpointException, OSError, RuntimeError) as error:
        # Nothing is wrong with the file: another rank is gone, which its own error explains.
        if is_lost_contact(error):
            raise
        raise UserError(f"{checkpoint} cannot be read ({_line(error)}); use another checkpoint") from None


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.size()) if isinstance(value, torch.Tensor | ShardedTensor) else None


def _times(shape: tuple[int, ...] | None) -> str:
    return "no tensor" if shape is None else " x ".join(map(str, shape)) or "a number"


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[-200:]
