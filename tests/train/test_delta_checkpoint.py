"""Delta checkpoints: a full one and the rows that have changed since are the state, bit for bit, or are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from embeddings.distributed.process_group import process_group
from embeddings.initialization import initialize
from pipeline.runs.checkpoint import Checkpoint, checkpoints_in
from pipeline.runs.checkpoint_writer import CheckpointWriter
from pipeline.runs.delta import DeltaState
from schemas.train import TrainSettings
from tests.launcher import run_ranks
from tests.runs import small_settings
from tests.trainers import CPU, Losses, Never, trainer_of

Values = dict[str, bytes]
"""By key, the bytes of a value; of a sharded one by the row that this rank's part begins with."""


def values_of(state: dict[str, Any]) -> Values:
    found = {}
    for key, value in flatten_state_dict(state)[0].items():
        if isinstance(value, ShardedTensor):
            for shard in value.local_shards():
                found[f"{key} {shard.metadata.shard_offsets}"] = shard.tensor.numpy().tobytes()
        elif isinstance(value, torch.Tensor):
            found[key] = value.numpy().tobytes()
        else:
            found[key] = repr(value).encode()
    return found


class Watching(CheckpointWriter):
    """A writer that remembers each state that it was given, and whether it saved a full one."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.states: dict[int, Values] = {}

    def save(self, state: Any, step: int, score: float | None, *, full: bool = True) -> None:
        self.states[step] = values_of(state)
        super().save(state, step, score, full=full)


def trained(
    settings: TrainSettings, data: Path, folder: Path, resumed: Checkpoint | None = None
) -> tuple[list[float], dict[int, Values]]:
    """The losses of a training in ``folder``, from a checkpoint or from the beginning, and the states that it saved."""
    report, trainer = Losses(), trainer_of(settings, data)
    if resumed is not None:
        # What is not loaded would be seen.
        initialize(trainer.model, 99)
        trainer.resume(resumed.path)
    with Watching(folder, 9, {}, DeltaState(trainer.model, resumed)) as writer:
        trainer.train(writer, report, Never())  # type: ignore[arg-type]
    dist.barrier()
    return report.losses, writer.states


def loaded(settings: TrainSettings, data: Path, checkpoint: Checkpoint) -> Values:
    trainer = trainer_of(settings, data)
    initialize(trainer.model, 99)
    trainer.resume(checkpoint.path)
    return values_of(trainer.state_dict())


def saved_and_loaded(settings: TrainSettings, data: Path, folder: Path) -> tuple[int, int]:
    """Train an epoch; how many checkpoints there are, each with the state of its step, and how many are deltas."""
    _, states = trained(settings, data, folder)
    checkpoints = checkpoints_in(folder)
    assert [each.step for each in checkpoints] == sorted(states)
    for checkpoint in checkpoints:
        assert loaded(settings, data, checkpoint) == states[checkpoint.step]
    deltas = [each for each in checkpoints if each.base is not None]
    return len(checkpoints), len(deltas)


@pytest.fixture(scope="module")
def data(few_users: Path) -> Path:
    return few_users


SETTINGS = ("epochs=1", "checkpoint.every=4", "checkpoint.delta_every=1")


@pytest.mark.parametrize("overrides", [(), ("model.attention.optimizer=adagrad", "model.representation.optimizer=sgd")])
def test_a_delta_has_the_state_of_its_step(data: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    settings = small_settings(*SETTINGS, *overrides)
    with process_group(CPU):
        assert saved_and_loaded(settings, data, tmp_path) == (6, 3)
    assert run_ranks(2, saved_and_loaded, settings, data, tmp_path / "2")[0] == (6, 3)
