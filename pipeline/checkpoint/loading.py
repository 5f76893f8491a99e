"""Loads a checkpoint into a state of the same kind, on any number of ranks."""

from pathlib import Path
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_in_place


def keys_in(checkpoint: Path) -> dict[str, tuple[int, ...] | None]:
    """Shapes by key; None for what is not a tensor.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    try:
        found = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    except Exception as error:  # whatever unpickling a damaged file raises
        raise ValueError(f"{checkpoint} cannot be read ({_line(error)}); use another checkpoint") from None
    return {key: tuple(kind.size) if isinstance(kind, TensorStorageMetadata) else None for key, kind in found.items()}


def load(state: dict[str, Any], checkpoint: Path) -> None:
    """Load the values of ``state`` from ``checkpoint``: tensors in place, others replaced. All ranks must call it.

    Args:
        state: nested dictionaries, some or all of the top-level keys that were saved.
        checkpoint: of any number of ranks.

    Raises:
        ValueError: the checkpoint has other keys or shapes, all of which are named; it is damaged.
    """
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
        raise ValueError(f"{checkpoint} is of another model: {'; '.join(differences[:5])}{more}")
    try:
        load_in_place(state, checkpoint_id=checkpoint)
    except (CheckpointException, OSError, RuntimeError) as error:
        raise ValueError(f"{checkpoint} cannot be read ({_line(error)}); use another checkpoint") from None


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.size()) if isinstance(value, torch.Tensor | ShardedTensor) else None


def _times(shape: tuple[int, ...] | None) -> str:
    return "no tensor" if shape is None else " x ".join(map(str, shape)) or "a number"


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[-200:]
