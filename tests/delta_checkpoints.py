"""Trainings in a test's process group that save delta checkpoints, and what these have."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from embeddings.initialization import initialize
from pipeline.runs.checkpoint import Checkpoint
from pipeline.runs.checkpoint_writer import CheckpointWriter
from pipeline.runs.delta import DeltaState
from schemas.train import TrainSettings
from tests.trainers import Losses, Never, SplitBatches, trainer_of

Values = dict[str, list[tuple[int, bytes]]]
"""By key, the bytes of a value, and with which row of the whole they begin."""
SETTINGS = ("epochs=1", "checkpoint.every=3", "checkpoint.delta_every=1")
"""Of six steps: a full one first, at steps 3 and 6; deltas at 2, 4 and 5."""


def values_of(state: dict[str, Any]) -> Values:
    """What this rank has of a state, but for the random states, which are a rank's own."""
    found: Values = {}
    for key, value in flatten_state_dict(state)[0].items():
        if key.startswith("random."):
            continue
        if isinstance(value, ShardedTensor):
            shards = value.local_shards()
            found[key] = [(shard.metadata.shard_offsets[0], shard.tensor.numpy().tobytes()) for shard in shards]
        else:
            content = value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
            found[key] = [(0, content)]
    return found


class Watching(CheckpointWriter):
    """A writer that remembers each state that it is given."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.states: dict[int, Values] = {}

    def save(self, state: Any, step: int, score: float | None, *, full: bool = True) -> None:
        self.states[step] = values_of(state)
        super().save(state, step, score, full=full)


def trained(
    settings: TrainSettings, data: Path, folder: Path, checkpoint: Checkpoint | None = None, stream: Any = SplitBatches
) -> tuple[list[float], dict[int, Values]]:
    """Train in ``folder`` to the end, from a checkpoint or from the beginning: losses, and the states that were saved.

    The state that it begins with counts as saved.
    """
    report, trainer = Losses(), trainer_of(settings, data)
    trainer.stream = stream()
    begun = {}
    if checkpoint is not None:
        # What was not loaded would be seen.
        initialize(trainer.model, 99)
        trainer.resume(checkpoint.path)
        begun = {trainer.step: values_of(trainer.state_dict())}
    with Watching(folder, 9, {}, DeltaState(trainer.model, checkpoint)) as writer:
        trainer.train(writer, report, Never())  # type: ignore[arg-type]
    dist.barrier()
    return report.losses, begun | writer.states


def loaded(settings: TrainSettings, data: Path, checkpoint: Checkpoint) -> Values:
    trainer = trainer_of(settings, data)
    initialize(trainer.model, 99)
    trainer.resume(checkpoint.path)
    return values_of(trainer.state_dict())


def read_by_the_format(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of a file, by the specification of safetensors."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__")
    kinds = {"F32": np.float32, "F16": np.float16, "I32": np.int32, "I64": np.int64}
    spans = sorted(of["data_offsets"] for of in header.values())
    # The format has no holes and no overlaps.
    assert [begin for begin, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == len(content) - 8 - size
    return {
        key: np.frombuffer(content[8 + size :][slice(*of["data_offsets"])], kinds[of["dtype"]]).reshape(of["shape"])
        for key, of in header.items()
    }
