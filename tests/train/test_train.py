"""Training: exact resume, ranks, signals, what a run writes."""

import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from embeddings.distributed.process_group import TIMEOUT
from pipeline.runs.checkpoint import checkpoints_in, last_checkpoint
from pipeline.runs.comparison import compare
from pipeline.runs.listing import run_state
from pipeline.runs.run_folder import RunFolder, StepLog, read_step_log
from pipeline.stream.data_set import DataSet
from schemas.shards import Split
from tests.datasets import random_users, write_dataset
from tests.runs import Run, kill_in_the_middle_of_a_write, pause, slow_steps, small_settings


@pytest.fixture(scope="module")
def data(many_users: Path) -> Path:
    return many_users


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return {ranks: Run(ranks, small_settings(), data, folder / str(ranks)).finish() for ranks in (1, 2)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_runs_go_on_exactly(ranks: int, data: Path, tmp_path: Path, undisturbed: dict[int, Run]) -> None:
    folder = tmp_path / "run"
    first = Run(ranks, small_settings(), data, folder, kill_in_the_middle_of_a_write, (ranks - 1, 3))
    codes = first.wait()
    assert codes[-1] == -signal.SIGKILL
    assert set(codes[:-1]) <= {1}
    steps = [checkpoint.step for checkpoint in checkpoints_in(folder / "checkpoints")]
    assert steps == [4, 8]
    second = Run(ranks, small_settings(), data, folder, pause, (15, tmp_path))
    second.wait_for_pause(tmp_path)
    second.kill()
    last = Run(ranks, small_settings(), data, folder).finish()
    assert "goes on after step" in last.said()
    assert last.logs() == undisturbed[ranks].logs()
    assert (folder / "test.json").read_text() == (undisturbed[ranks].folder / "test.json").read_text()
    assert not list((folder / "checkpoints").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_again_and_again(ranks: int, data: Path, tmp_path: Path, undisturbed: dict[int, Run]) -> None:
    folder, draw = tmp_path / "run", random.Random(ranks)
    for _ in range(12):
        run = Run(ranks, small_settings("checkpoint.every=1"), data, folder)
        time.sleep(draw.uniform(0.5, 5))
        run.kill()
    last = Run(ranks, small_settings(), data, folder).finish()
    assert last.logs() == undisturbed[ranks].logs()


def test_what_a_run_leaves(undisturbed: dict[int, Run]) -> None:
    folder = undisturbed[2].folder
    losses = read_step_log(folder / "losses.jsonl")
    assert [line["step"] for line in losses] == list(range(1, len(losses) + 1))
    validations = read_step_log(folder / "validations.jsonl")
    ends = {len(losses) // 2, len(losses)}  # of both epochs
    assert [line["step"] for line in validations] == sorted({*range(9, len(losses), 9), *ends})
    kept = checkpoints_in(folder / "checkpoints")
    best = max(validations, key=lambda line: line["auc"])
    scores = [checkpoint.score for checkpoint in kept if checkpoint.score is not None]
    assert max(scores) == best["auc"]
    assert kept[-1].step == len(losses)
    assert len(kept) <= 3
    test = json.loads((folder / "test.json").read_text())
    assert test["checkpoint_step"] == best["step"]
    plan = json.loads((kept[-1].path / "plan.json").read_text())
    assert {"item_attention", "item_representation"} <= plan.keys()
    assert plan["item_attention"]["sharding_type"] == "row_wise"
    assert (kept[-1].path / "settings.yaml").read_text() == (folder / "settings.yaml").read_text()


def test_a_finished_run_says_so_and_can_be_made_longer(data: Path, tmp_path: Path) -> None:
    short = Run(1, small_settings("epochs=1"), data, tmp_path / "run").finish()
    steps = read_step_log(short.folder / "losses.jsonl")[-1]["step"]
    again = Run(1, small_settings("epochs=1"), data, tmp_path / "run").finish()
    assert f"finished already, at step {steps:.0f}" in again.said()
    tested = (short.folder / "test.json").read_text()
    longer = Run(1, small_settings("epochs=2"), data, tmp_path / "run", slow_steps, (steps + 2,)).finish()
    assert "asked to stop" in longer.said()
    assert not (short.folder / "test.json").exists()
    fewer = Run(1, small_settings("epochs=1"), data, tmp_path / "run")
    assert fewer.wait() == [1]
    assert f"epochs is 1, but epoch 2 of the run is begun or done already, at step {steps + 3}" in fewer.complaint()
    Run(1, small_settings("epochs=2"), data, tmp_path / "run").finish()
    assert read_step_log(short.folder / "losses.jsonl")[-1]["step"] == 2 * steps
    assert (short.folder / "test.json").read_text() != tested
    former = (short.folder / "settings.yaml").read_text(), (short.folder / "test.json").read_text()
    assert Run(1, small_settings("epochs=1"), data, tmp_path / "run").wait() == [1]
    Run(1, small_settings("epochs=2", "checkpoint.every=5"), data, tmp_path / "run").finish()
    assert ((short.folder / "settings.yaml").read_text(), (short.folder / "test.json").read_text()) == former


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_finished_run_needs_no_last_checkpoint(
    ranks: int, data: Path, tmp_path: Path, undisturbed: dict[int, Run]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed[ranks].folder, folder)
    *earlier, last = checkpoints_in(folder / "checkpoints")
    assert earlier
    shutil.rmtree(last.path)
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    again = Run(ranks, small_settings(), data, folder).finish()
    assert "finished already, at step" in again.said()
    fewer = Run(ranks, small_settings("epochs=1"), data, folder)
    assert set(fewer.wait()) == {1}
    assert "epochs is 1, but epoch 2 of the run is begun or done already" in fewer.complaint()
    assert before == {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_tensorboard_has_each_point_once(data: Path, tmp_path: Path) -> None:
    first = Run(1, small_settings(), data, tmp_path / "run", pause, (20, tmp_path))
    first.wait_for_pause(tmp_path)
    first.kill()
    last = Run(1, small_settings(), data, tmp_path / "run").finish()
    events = EventAccumulator(str(last.folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()
    assert {"loss/train", "learning_rate/dense", "speed/samples_per_s", "speed/waiting_for_data"} <= set(
        tags["scalars"]
    )
    assert {"gradient_norm/attention", "gradient_norm/representation", "memory/resident_gib"} <= set(tags["scalars"])
    assert {"validation/auc", "validation/gauc", "validation/log_loss"} <= set(tags["scalars"])
    assert {"validation_logits/positive", "validation_logits/negative"} <= set(tags["histograms"])
    assert {"settings.yaml/text_summary", "plan.json/text_summary"} <= set(tags["tensors"])
    steps = [event.step for event in events.Scalars("loss/train")]
    assert steps == list(range(5, steps[-1] + 1, 5))
    logged = {line["step"]: line["loss"] for line in read_step_log(last.folder / "losses.jsonl")}
    for event in events.Scalars("loss/train"):
        assert event.value == pytest.approx(logged[event.step])
    assert all(event.value > 0 for event in events.Scalars("gradient_norm/attention"))


def test_sigterm_on_any_rank_saves_and_ends_well(data: Path, tmp_path: Path, undisturbed: dict[int, Run]) -> None:
    run = Run(2, small_settings("checkpoint.every=1000"), data, tmp_path / "run", pause, (5, tmp_path))
    run.wait_for_pause(tmp_path)
    run.terminate(1)
    (tmp_path / "go").touch()
    run.finish()
    assert "asked to stop, saved at step" in run.said()
    stopped = read_step_log(run.folder / "losses.jsonl")[-1]["step"]
    assert checkpoints_in(run.folder / "checkpoints")[-1].step == stopped
    assert not (run.folder / "test.json").exists()
    last = Run(2, small_settings(), data, tmp_path / "run").finish()
    assert last.logs() == undisturbed[2].logs()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_rank_stops_the_others(rank: int, data: Path, tmp_path: Path) -> None:
    run = Run(2, small_settings("epochs=50"), data, tmp_path / "run")
    run.wait_for_step(10)
    run.kill(rank)
    began = time.monotonic()
    codes = run.wait()
    assert time.monotonic() - began < TIMEOUT.total_seconds() / 2, "they did not wait for a collective's timeout"
    assert (codes[rank], codes[1 - rank]) == (-signal.SIGKILL, 1)
    assert f"rank {1 - rank} of 2 has lost another one" in run.complaint()
    assert checkpoints_in(run.folder / "checkpoints")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_that_is_not_finite_stops_all_ranks(ranks: int, data: Path, tmp_path: Path) -> None:
    settings = small_settings("model.attention.learning_rate=1e38", "model.representation.learning_rate=1e38")
    run = Run(ranks, settings, data, tmp_path / "run")
    assert set(run.wait()) == {1}
    assert "loss or gradients are not finite, in data train, epoch 0, step" in run.complaint()


@pytest.mark.parametrize("splits", [(Split.TRAIN,), (Split.TRAIN, Split.VALIDATION), (Split.TRAIN, Split.TEST)])
def test_data_without_validation_or_test(tmp_path: Path, splits: tuple[Split, ...]) -> None:
    """Without validation the last checkpoint counts; without a test its metrics are null, and the run is finished."""
    write_dataset(tmp_path / "data", random_users(40, splits=splits))
    run = Run(2, small_settings("epochs=1", "checkpoint.every=3"), tmp_path / "data", tmp_path / "run").finish()
    folder = RunFolder(run.folder)
    test, last = folder.test(), last_checkpoint(folder.checkpoints)
    assert last is not None
    validated = Split.VALIDATION in splits
    assert test["checkpoint"] == ("best" if validated else "last")
    assert bool(read_step_log(folder.validations)) == validated
    assert test["steps"] == last.step
    assert validated or test["checkpoint_step"] == last.step
    assert (test["auc"] is None) == (Split.TEST not in splits)
    assert test["samples"] == DataSet.open(tmp_path / "data").manifest.counts.test.targets
    assert run_state(run.folder).state == "finished"
    assert compare([run.folder, run.folder])[0]["auc"] == test["auc"]
    # It is finished: nothing is left to do.
    assert "finished already" in Run(1, folder.settings(), tmp_path / "data", run.folder).finish().said()


def test_refusals(data: Path, tmp_path: Path) -> None:
    def complaint(settings: Any, data: Path = data, folder: Path = tmp_path / "run", ranks: int = 1) -> str:
        run = Run(ranks, settings, data, folder)
        assert set(run.wait()) == {1}
        return run.complaint()

    Run(1, small_settings("epochs=1"), data, tmp_path / "run").finish()
    message = complaint(small_settings("epochs=1", "model.attention.dim=8", "model.retrieved.history=3"), ranks=2)
    assert "model.attention.dim is 8, was 4, model.retrieved.history is 3, was 4; use the same" in message
    other = tmp_path / "other"
    write_dataset(other, random_users(50, seed=1))
    assert "begun with another data set" in complaint(small_settings("epochs=1"), other)
    assert "not a data set" in complaint(small_settings(), tmp_path / "none", tmp_path / "new", ranks=2)
    assert not (tmp_path / "new").exists()
    write_dataset(tmp_path / "no-train", random_users(50, splits=(Split.TEST, Split.VALIDATION)))
    assert "no targets to stream in split train" in complaint(small_settings(), tmp_path / "no-train", tmp_path / "new")
    assert "not the folder of a run" in complaint(small_settings(), folder=tmp_path / "other")
    assert "model.name: must be one of" in complaint(small_settings("model.name=tree"), folder=tmp_path / "new")
    assert "optimizer adam needs CUDA" in complaint(
        small_settings("model.attention.optimizer=adam"), folder=tmp_path / "new"
    )
    assert "scene is not in this data set" in complaint(
        small_settings("model.features=[item,scene]"), folder=tmp_path / "new"
    )
    assert not (tmp_path / "new").exists()
    busy = Run(1, small_settings("epochs=50"), data, tmp_path / "busy")
    busy.wait_for_step(5)
    assert "another process is training in" in complaint(small_settings("epochs=50"), folder=tmp_path / "busy")
    busy.kill()


def test_more_retrieved_than_there_is(data: Path, tmp_path: Path) -> None:
    Run(1, small_settings("epochs=1", "model.retrieved.history=50"), data, tmp_path / "run").finish()


def test_step_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = StepLog(path, 0)
    for step in range(1, 6):
        log.add(step, loss=0.1 * step)
    log.close()
    with path.open("a") as stream:
        stream.write('{"step": 6, "lo')
    assert len(read_step_log(path)) == 5
    StepLog(path, 7).close()
    assert len(path.read_text().splitlines()) == 5
    StepLog(path, 3).close()
    assert read_step_log(path)[-1] == {"step": 3, "loss": 0.1 * 3}
    StepLog(path, 0).close()
    assert path.read_text() == ""
