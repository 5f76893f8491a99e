"""Runs with delta checkpoints, on a data set with features of every kind: killed, damaged, evaluated and scored."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from embeddings.distributed.process_group import process_group
from pipeline.evaluate.score import score_run
from pipeline.runs.checkpoint import checkpoints_in, final_path
from pipeline.runs.run_folder import read_step_log
from schemas.train import TrainSettings
from tests.featured import Log, write_featured
from tests.runs import Run, kill_in_the_middle_of_a_write, pause, small_settings
from tests.trainers import CPU


def run_settings(*overrides: str) -> TrainSettings:
    return small_settings("epochs=5", "stream.batch_size=8", "checkpoint.keep=99", *overrides)


DELTAS = run_settings("checkpoint.every=8", "checkpoint.delta_every=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("featured") / "data"
    write_featured(folder, Log.random(60, seed=1), seed=1)
    return folder


@pytest.fixture(scope="module")
def undisturbed(data: Path) -> Run:
    """A run of two ranks with a full checkpoint a step."""
    return Run(2, run_settings("checkpoint.every=1"), data, data.parent / "undisturbed").finish()


@pytest.fixture(scope="module")
def killed(data: Path) -> Run:
    """A run of two ranks that was killed while it wrote its third delta, and between two others."""
    folder, marks = data.parent / "killed", data.parent / "marks"
    marks.mkdir()
    first = Run(2, DELTAS, data, folder, kill_in_the_middle_of_a_write, (1, 3))
    assert first.wait() == [1, -signal.SIGKILL]
    assert [each.step for each in checkpoints_in(folder / "checkpoints")] == [2, 4]
    second = Run(2, DELTAS, data, folder, pause, (13, marks))
    second.wait_for_pause(marks)
    second.kill()
    assert checkpoints_in(folder / "checkpoints")[-1].base is not None
    last = Run(2, DELTAS, data, folder).finish()
    assert "goes on after step" in last.said()
    return last


def test_a_run_killed_between_and_within_deltas_goes_on_exactly(killed: Run, undisturbed: Run) -> None:
    steps = read_step_log(undisturbed.folder / "losses.jsonl")[-1]["step"]
    assert steps > 16
    assert killed.logs() == undisturbed.logs()
    assert (killed.folder / "test.json").read_text() == (undisturbed.folder / "test.json").read_text()
    checkpoints = checkpoints_in(killed.folder / "checkpoints")
    full = {checkpoint.step for checkpoint in checkpoints if checkpoint.base is None}
    assert full == {2, *range(8, int(steps) + 1, 8), steps}
    assert {*range(2, int(steps) + 1, 2)} <= {checkpoint.step for checkpoint in checkpoints}
    assert not list((killed.folder / "checkpoints").glob(".*"))


def test_a_delta_is_scored_as_a_full_one(killed: Run, undisturbed: Run, tmp_path: Path) -> None:
    checkpoints = checkpoints_in(killed.folder / "checkpoints")
    delta = [checkpoint for checkpoint in checkpoints if checkpoint.base is not None][-1]
    with process_group(CPU):
        for run in (killed, undisturbed):
            score_run(run.folder, "test", str(delta.step), None, tmp_path / run.folder.name, CPU, overwrite=False)
    part = "part-00000.parquet"
    assert (tmp_path / "killed" / part).read_bytes() == (tmp_path / "undisturbed" / part).read_bytes()


def test_a_damaged_full_one_takes_its_deltas_with_it(killed: Run, undisturbed: Run, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed.folder, folder)
    (folder / "test.json").unlink()
    for checkpoint in checkpoints_in(folder / "checkpoints"):
        if checkpoint.step > 10:
            shutil.rmtree(checkpoint.path)
    full = final_path(folder / "checkpoints", 8)
    file = next(full.glob("__1_*.distcp"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    again = Run(2, DELTAS, data, folder).finish()
    said = again.said()
    lost = [each for each in checkpoints_in(killed.folder / "checkpoints") if 8 < each.step <= 10]
    assert [each.base.step for each in lost if each.base is not None] == [8] * len(lost)
    for delta in lost:
        path = folder / "checkpoints" / delta.path.name
        assert f"{path} is damaged: {full.name}/{file.name} differs from its SHA-256" in said
    assert f"{full} is damaged: {file.name} differs from its SHA-256" in said
    assert "goes on after step 6 instead" in said
    assert again.logs() == undisturbed.logs()
    assert json.loads((folder / "test.json").read_text()) == json.loads((undisturbed.folder / "test.json").read_text())
