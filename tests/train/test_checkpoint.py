"""Checkpoints: resharding, what stays, full disks, damaged ones and ones of another model."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import get_unwrapped_module

from embeddings.distributed.process_group import process_group
from embeddings.sizes import DataSizes
from pipeline.evaluate.open_run import load_model
from pipeline.runs.checkpoint import (
    best_checkpoint,
    checkpoints_in,
    final_path,
    last_checkpoint,
    prune,
    remove_leftovers,
)
from pipeline.runs.checkpoint_files import load
from pipeline.runs.checkpoint_writer import CheckpointWriter
from pipeline.stream.data_set import DataSet
from schemas.train import TrainSettings
from tests.launcher import run_ranks
from tests.runs import Run, small_settings
from tests.tolerance import largest, rounding, summands
from tests.toy_batch import toy_batch
from tests.trainers import CPU, Losses, Never, train_and_save, trainer_of


def predict(settings: TrainSettings, data: Path, checkpoint: Path) -> torch.Tensor:
    trainer = trainer_of(settings, data)
    load_model(trainer.model, checkpoint)
    trainer.model.eval()
    batch = toy_batch(99, targets=15 if dist.get_rank() == 0 else 0)
    with torch.no_grad():
        return trainer.model(batch).logit_T


def next_losses(settings: TrainSettings, data: Path, checkpoint: Path) -> list[float]:
    """The losses of the epoch after the checkpoint's."""
    report, trainer = Losses(), trainer_of(settings, data)
    trainer.resume(checkpoint)
    with CheckpointWriter(checkpoint.parent / f"of-{dist.get_world_size()}", 1, {}) as writer:
        trainer.train(writer, report, Never())  # type: ignore[arg-type]
    return report.losses


@pytest.fixture(scope="module")
def data(few_users: Path) -> Path:
    return few_users


def all_of_it(data: Path, folder: Path, checkpoint: Path) -> tuple[list[float], torch.Tensor, list[float]]:
    """Losses of an epoch; from ``checkpoint``, predictions and the losses of another epoch."""
    settings = small_settings("epochs=1", "checkpoint.every=6")
    losses = train_and_save(settings, data, folder)
    longer = small_settings("epochs=2", "checkpoint.every=6")
    return losses, predict(settings, data, checkpoint), next_losses(longer, data, checkpoint)


def test_ranks_change_nothing_and_can_change(data: Path, tmp_path: Path) -> None:
    """The same losses on 1, 2 and 4 ranks; a checkpoint of 2 ranks predicts and trains the same on 1 and 4."""
    checkpoint = final_path(tmp_path / "2", 6)
    losses, logit_T, further = run_ranks(2, all_of_it, data, tmp_path / "2", checkpoint)[0]
    assert len(losses) == len(further) == 6
    with process_group(CPU):
        outcomes = [all_of_it(data, tmp_path / "1", checkpoint)]
    outcomes += run_ranks(4, all_of_it, data, tmp_path / "4", checkpoint)
    with process_group(CPU):
        model = get_unwrapped_module(trainer_of(small_settings(), data).model)
    # Every rank adds in its own order; each step of training begins with what the one before has made.
    added = summands(model, toy_batch(0, targets=24))
    for outcome in outcomes[:2]:  # the first ranks; the others predict no targets
        torch.testing.assert_close(outcome[1], logit_T, atol=rounding(added, largest(logit_T)), rtol=0)
    for outcome in outcomes:
        assert outcome[0] == pytest.approx(losses, rel=0, abs=rounding(6 * added, max(losses)))
        assert outcome[2] == pytest.approx(further, rel=0, abs=rounding(6 * added, max(further)))


@pytest.fixture(scope="module")
def saved(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    with process_group(CPU):
        train_and_save(small_settings("epochs=1"), data, folder)
    found = last_checkpoint(folder)
    assert found is not None
    return found.path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.attention.dim=8", "item_attention.weight is 51 x 4, in the model 51 x 8"),
        ("model.name=twin", "is not in it"),
        ("stream.history_length=20", "history_position_attention.weight is 13 x 4, in the model 21 x 4"),
        ("model.hidden=[16,8]", "prediction.layers"),
    ],
)
def test_checkpoint_of_another_model(data: Path, saved: Path, override: str, message: str) -> None:
    overrides = ["model.attention.dim=8"] if "twin" in override else []
    with process_group(CPU):
        trainer = trainer_of(small_settings(override, *overrides), data)
        with pytest.raises(ValueError, match="is of another model: ") as error:
            load_model(trainer.model, saved)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_damaged_checkpoint(data: Path, saved: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "step-000000000001"
    subprocess.run(["cp", "-r", str(saved), str(damaged)], check=True)
    state = next(damaged.glob("*.distcp"))
    content = state.read_bytes()
    with process_group(CPU):
        trainer = trainer_of(small_settings("epochs=1"), data)
        state.write_bytes(content[: len(content) // 3])
        with pytest.raises(ValueError, match=r"is (damaged|missing)"):
            load_model(trainer.model, damaged)
        state.unlink()
        with pytest.raises(ValueError, match=r"is (damaged|missing)"):
            load_model(trainer.model, damaged)
        (damaged / ".metadata").write_bytes(b"nonsense")
        with pytest.raises(ValueError, match=r"is (damaged|missing)"):
            load_model(trainer.model, damaged)
    (damaged / "checkpoint.json").write_text("{")
    (found,) = checkpoints_in(tmp_path)
    assert found.damage is not None
    assert "checkpoint.json is damaged" in found.damage
    assert last_checkpoint(tmp_path) is None


def test_the_copy_does_not_change_while_training_goes_on(tmp_path: Path) -> None:
    """Saving goes on in a thread; what it writes is the state at the call."""
    with process_group(CPU), CheckpointWriter(tmp_path, 2, {"plan.json": "{}"}) as writer:
        value = torch.zeros(1_000_000)
        writer.save({"model": {"a": value, "nested": [value[:3]]}, "progress": {"step": 5, "none": None}}, 5, 0.5)
        value += 1
        writer.wait()
        state = {"model": {"a": torch.ones(1_000_000)}, "progress": {"step": 0, "none": 1}}
        found = last_checkpoint(tmp_path)
        assert found is not None
        assert (found.step, found.score) == (5, 0.5)
        assert (found.path / "plan.json").read_text() == "{}"
    with process_group(CPU):
        state["model"]["nested"] = [torch.ones(3)]  # type: ignore[index]
        load(state, found.path)
        assert state["progress"] == {"step": 5, "none": None}
        assert not state["model"]["a"].any()  # type: ignore[index]
        assert not state["model"]["nested"][0].any()  # type: ignore[index]


def test_the_last_ones_and_the_best_stay(tmp_path: Path) -> None:
    for step, score in ((1, 0.5), (2, None), (3, 0.9), (4, None), (5, None), (12, 0.7)):
        (tmp_path / f"step-{step:012}").mkdir()
        record = {"step": step, "score": score}
        (tmp_path / f"step-{step:012}" / "checkpoint.json").write_text(json.dumps(record))
    (tmp_path / ".step-000000000013.partial").mkdir()
    prune(tmp_path, 2)
    assert [checkpoint.step for checkpoint in checkpoints_in(tmp_path)] == [3, 5, 12]
    best = best_checkpoint(tmp_path)
    assert best is not None
    assert best.step == 3
    remove_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("ranks", [1, 2])
def test_full_disk(data: Path, tmp_path: Path, small_disk: Path, ranks: int) -> None:
    deltas = ["checkpoint.delta_every=1"] if ranks == 2 else []
    settings = small_settings("epochs=20", "checkpoint.every=2", "checkpoint.keep=100", *deltas)
    run = Run(ranks, settings, data, small_disk / "run")
    assert set(run.wait()) == {1}
    whole = checkpoints_in(small_disk / "run" / "checkpoints")
    assert len(whole) > 1
    assert f"cannot be written: no space left; the last one is of step {whole[-1].step}" in run.complaint()
    assert not list((small_disk / "run" / "checkpoints").glob(".*"))
    with process_group(CPU):
        trainer = trainer_of(settings, data)
        for checkpoint in whole:
            load_model(trainer.model, checkpoint.path)


def test_sizes_come_from_the_manifest(data: Path) -> None:
    sizes = DataSizes.of(DataSet.open(data).manifest, small_settings().stream)
    assert sizes.rows("item") == 51
