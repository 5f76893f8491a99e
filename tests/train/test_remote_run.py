"""Runs at a URL: trained from data on an object store, killed, gone on with, evaluated, scored, listed and compared."""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import pipeline.runs.lease
import schemas.stores
from embeddings.distributed.process_group import process_group
from jobs.cli import main
from pipeline.evaluate.open_run import evaluate_run
from pipeline.evaluate.score import score_run
from pipeline.runs.checkpoint import checkpoints_in, damage_of
from pipeline.runs.comparison import compare
from pipeline.runs.lease import is_leased, leased
from pipeline.runs.listing import find_runs, run_state
from pipeline.runs.run_folder import RunFolder, read_step_log
from schemas.errors import StoreError, UserError
from schemas.storage import RemotePath
from schemas.train import TrainSettings
from tests.object_store import STORES, MotoStore, ObjectStore, object_store
from tests.runs import Run, slow_steps, small_settings
from tests.trainers import CPU


@pytest.fixture(scope="module", params=STORES)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with (
        object_store(request.param, tmp_path_factory.mktemp("store")) as running,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(schemas.stores, "FIRST_WAIT_S", 0.01)
        yield running


@pytest.fixture
def store(running: ObjectStore) -> Iterator[ObjectStore]:
    yield running
    running.fault, running.failed = None, []


@pytest.fixture(scope="module")
def data(running: ObjectStore, many_users: Path) -> RemotePath:
    """The data set of `many_users` at a URL."""
    folder = running.path("data")
    for file in many_users.iterdir():
        (folder / file.name).upload(file)
    return folder


DELTAS = ("checkpoint.delta_every=2",)
"""Of the run at a URL: it is killed after a delta or a full checkpoint, as it happens."""


def settings(*overrides: str) -> TrainSettings:
    return small_settings("epochs=1", *overrides)


def in_environment(rank: int, environment: dict[str, str], slowly: bool = False) -> None:
    """What tests call sabotage: the environment that finds the store."""
    os.environ.update(environment)
    schemas.stores.FIRST_WAIT_S = 0.01
    if slowly:
        slow_steps(rank)


def start(store: ObjectStore, ranks: int, data: Path, name: str, *overrides: str, slowly: bool = False) -> Run:
    arguments = (store.environment, slowly)
    return Run(ranks, settings(*overrides), data, store.path(name), in_environment, arguments)


@pytest.fixture(scope="module")
def undisturbed(many_users: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of two ranks on a disk."""
    return Run(2, settings(*DELTAS), many_users, tmp_path_factory.mktemp("undisturbed") / "run").finish()


@pytest.fixture(scope="module")
def remote(running: ObjectStore, data: RemotePath) -> Run:
    """A run at a URL that was killed after a checkpoint, and went on."""
    run = start(running, 2, data, "runs/killed", *DELTAS, slowly=True)
    run.wait_for_step(4)
    until = time.monotonic() + 60
    while not checkpoints_in(run.folder / "checkpoints"):
        assert time.monotonic() < until, run.said()
        time.sleep(0.05)
    run.kill()
    assert run_state(run.folder).state == "died"
    assert run_state(run.folder).checkpoint_step
    again = start(running, 2, data, "runs/killed", *DELTAS).finish()
    assert "goes on after step" in again.said()
    return again


def test_a_killed_run_at_a_url_ends_as_one_on_a_disk(remote: Run, undisturbed: Run) -> None:
    assert remote.logs() == undisturbed.logs()
    here, there = (json.loads((run.folder / "test.json").read_bytes()) for run in (undisturbed, remote))
    assert here == there
    names = {str(file.relative_to(remote.folder)) for file in remote.folder.files()}  # type: ignore[attr-defined]
    on_disk = {path.relative_to(undisturbed.folder).as_posix() for path in undisturbed.folder.rglob("*")}
    for name in ("settings.yaml", "job.json", "data_set.json", "plan.json", "progress.json", "losses.jsonl"):
        assert name in names & on_disk
    assert {name for name in names if name.startswith("checkpoints")} == {
        name for name in on_disk if name.startswith("checkpoints/") and "." in name.rpartition("/")[2]
    }
    # One event file a start that got far enough, and no lock.
    assert sum(name.startswith("tensorboard/events") for name in names) == 2
    assert ".lock" not in names


def test_no_secret_is_recorded(remote: Run, running: ObjectStore) -> None:
    for file in remote.folder.files():  # type: ignore[attr-defined]
        content = file.read_bytes()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            assert running.environment[name].encode() not in content, file
    assert running.environment["AWS_SECRET_ACCESS_KEY"] not in remote.said()


def test_a_run_at_a_url_is_evaluated_scored_listed_and_compared(
    remote: Run, undisturbed: Run, data: RemotePath, store: ObjectStore, tmp_path: Path
) -> None:
    with process_group(CPU):
        here = repr(evaluate_run(undisturbed.folder, "test", "best", None, CPU))
        there = repr(evaluate_run(remote.folder, "test", "best", None, CPU))
        assert here == there
        for out in (tmp_path / "scores", store.path("scores")):
            score_run(remote.folder, "test", "best", None, out, CPU, overwrite=False)
        assert store.names("scores") == {"part-00000.parquet", "_SUCCESS"}
        part = "part-00000.parquet"
        assert (store.path("scores") / part).read_bytes() == (tmp_path / "scores" / part).read_bytes()
        with pytest.raises(UserError, match="not empty; choose another folder or pass --overwrite"):
            score_run(remote.folder, "test", "best", None, store.path("scores"), CPU, overwrite=False)
        score_run(remote.folder, "test", "best", None, store.path("scores"), CPU, overwrite=True)
    assert pq.read_table(tmp_path / "scores").num_rows > 0
    assert find_runs(store.path("runs")) == [remote.folder]
    state = run_state(remote.folder)
    assert (state.state, state.starts) == ("finished", 2)
    rows = compare([undisturbed.folder, remote.folder])
    assert rows[0]["auc"] == rows[1]["auc"]
    assert rows[1]["data"]["folder"] == str(data)


def test_the_command_line_takes_urls(
    remote: Run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, said in (
        (["runs", "s3://bucket/runs"], "killed"),
        (["compare", str(remote.folder), str(remote.folder)], "killed"),
    ):
        monkeypatch.setattr(sys, "argv", ["dare", *command])
        with pytest.raises(SystemExit) as exit:
            main()
        assert not exit.value.code
        assert said in capsys.readouterr().out


@pytest.fixture(scope="module")
def interrupted(running: ObjectStore, data: RemotePath) -> Run:
    """A run at a URL whose second checkpoint could not be uploaded."""
    if not isinstance(running, MotoStore):
        pytest.skip("only moto's server fails when it is told to")
    running.fault = lambda method, path: (
        "503"
        if method in ("PUT", "POST") and "/checkpoints/step-" in path and "step-000000000004" not in path
        else None
    )
    run = start(running, 2, data, "interrupted", "checkpoint.keep=9")
    run.wait()
    running.fault = None
    return run


@pytest.mark.slow
def test_an_interrupted_checkpoint_leaves_the_former_one(
    interrupted: Run, store: ObjectStore, data: RemotePath
) -> None:
    assert {process.exitcode for process in interrupted.processes} == {1}
    assert "the checkpoint of step " in interrupted.complaint()
    assert "the last one is of step 4" in interrupted.complaint()
    checkpoints = checkpoints_in(interrupted.folder / "checkpoints")
    assert [checkpoint.step for checkpoint in checkpoints] == [4]
    assert damage_of(checkpoints[0]) is None
    assert run_state(interrupted.folder).state == "failed"
    again = start(store, 2, data, "interrupted", "checkpoint.keep=9").finish()
    assert "goes on after step 4" in again.said()
    assert run_state(interrupted.folder).state == "finished"


@pytest.mark.slow
def test_a_damaged_checkpoint_at_a_url_is_passed_over_and_one_that_cannot_be_read_is_not(
    interrupted: Run, store: ObjectStore, data: RemotePath
) -> None:
    folder = interrupted.folder
    # To its end; where the slow test before has done so, it is finished already.
    start(store, 2, data, "interrupted", "checkpoint.keep=9").finish()
    (folder / "test.json").unlink()
    former, last = checkpoints_in(folder / "checkpoints")[-2:]
    assert last.files
    store.fault = lambda method, path: "503" if method == "GET" and ".distcp" in path else None
    with pytest.raises(StoreError, match=r"distcp: "):
        damage_of(last)
    store.fault = None
    file = last.path / last.files[0].path
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    again = start(store, 2, data, "interrupted", "checkpoint.keep=9").finish()
    assert f"{last.path} is damaged: " in again.said()
    assert f"goes on after step {former.step} instead" in again.said()
    assert damage_of(checkpoints_in(folder / "checkpoints")[-1]) is None


def test_one_process_at_a_time(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.runs.lease, "LEASE_S", 2.5)
    file = store.path("locks/.lock")
    with leased(file, "held"):
        assert is_leased(file)
        with pytest.raises(UserError, match="held"), leased(file, "held"):
            raise AssertionError
        assert RunFolder(store.path("locks")).is_locked()
    assert not is_leased(file)
    # Of a process on another machine that is gone: taken after a while. Of one on this machine: at once.
    file.write_bytes(json.dumps({"host": "elsewhere", "process": 1, "token": "x"}).encode())
    assert is_leased(file)
    with leased(file, "held"):
        pass
    file.write_bytes(json.dumps({"host": os.uname().nodename, "process": 2**22 + 1, "token": "x"}).encode())
    assert not is_leased(file)


def test_logs_of_steps_are_cut_and_go_on(remote: Run) -> None:
    steps = [line["step"] for line in read_step_log(remote.folder / "losses.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
