"""What a run records of its starts, and how `dare runs` lists the runs below a folder."""

import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.cli import main
from pipeline.runs.checkpoint import checkpoints_in
from pipeline.runs.comparison import distinct_names
from pipeline.runs.job_record import git_state
from pipeline.runs.listing import find_runs, run_state
from pipeline.runs.run_folder import RunFolder, read_step_log
from schemas.documents import json_line, read_json
from tests.launcher import PATIENCE_S
from tests.runs import Run, pause, slow_steps, small_settings


@pytest.fixture(scope="module")
def data(many_users: Path) -> Path:
    return many_users


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, one that was asked to stop, one that was killed."""
    folder = tmp_path_factory.mktemp("runs")
    settings = small_settings("epochs=1")
    (folder / "deep/er").mkdir(parents=True)
    Run(2, settings, data, folder / "deep/er/finished", with_variable, ("TORCHX_JOB_ID", "slurm://torchx/17")).finish()
    Run(1, settings, data, folder / "stopped", slow_steps, (5,)).finish()
    # Two checkpoints have been begun in step 10: the first one is whole.
    marks = tmp_path_factory.mktemp("marks")
    killed = Run(1, small_settings("epochs=50"), data, folder / "died", pause, (10, marks))
    killed.wait_for_pause(marks)
    killed.kill()
    return folder


def with_variable(rank: int, name: str, value: str) -> None:
    os.environ[name] = value


def starts_of(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "job.json").read_text())["starts"]


# What is recorded.


def test_a_finished_run_says_who_trained_it(runs: Path) -> None:
    run = runs / "deep/er/finished"
    (start,) = starts_of(run)
    assert start["app"] == "slurm://torchx/17"
    assert start["step"] == 0
    assert start["how"] == "finished"
    assert start["time"] <= start["ended"]
    assert start["versions"]["torch"] == torch.__version__
    assert start["versions"]["torchrec"] == version("torchrec")
    assert start["versions"]["python"] == platform.python_version()
    assert len([name for name in start["versions"] if name.startswith("fbgemm-gpu")]) == 1
    topology = start["topology"]
    assert (topology["ranks"], topology["hosts"], topology["device"]) == (2, [platform.node()], "cpu")
    assert topology["device_name"]
    plan = read_json(run / "plan.json")
    assert {rank for table in plan.values() for rank in table["ranks"]} == {0, 1}
    assert (run / "plan.json").read_text() == (max(run.glob("checkpoints/step-*")) / "plan.json").read_text()
    assert not list(run.glob(".*.tmp"))


def test_each_start_is_appended(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    killed = Run(2, small_settings("epochs=50"), data, run, pause, (10, tmp_path))
    killed.wait_for_pause(tmp_path)
    killed.kill()
    (first,) = starts_of(run)
    assert "ended" not in first
    Run(2, small_settings("epochs=50"), data, run, slow_steps, (14,)).finish()
    first_again, second = starts_of(run)
    assert first_again == first
    assert second["how"] == "stopped"
    assert second["step"] in (4, 8, 9)  # the last checkpoint that was whole; the validation of step 9 may save one
    Run(2, small_settings("epochs=50"), data, run, slow_steps, (16,)).finish()
    assert [start["step"] for start in starts_of(run)] == [0, second["step"], 15]  # of a stop in step 14


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_error_is_recorded(ranks: int, data: Path, tmp_path: Path) -> None:
    settings = small_settings("model.attention.learning_rate=1e38", "model.representation.learning_rate=1e38")
    run = Run(ranks, settings, data, tmp_path / "run")
    assert set(run.wait()) == {1}
    (start,) = starts_of(run.folder)
    assert start["how"] == "failed"
    assert "loss or gradients are not finite" in start["error"]
    state = run_state(run.folder)
    assert (state.state, state.error) == ("failed", start["error"])


def test_git_state(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path / "checkout", check=True, capture_output=True, text=True
        ).stdout.strip()

    (tmp_path / "checkout/inner").mkdir(parents=True)
    git("init", "--quiet")
    assert git_state(tmp_path / "checkout") is None  # no revision yet
    (tmp_path / "checkout/inner/file").write_text("one")
    git("add", ".")
    git("commit", "--quiet", "-m", "one")
    revision = git("rev-parse", "HEAD")
    assert git_state(tmp_path / "checkout") == {"revision": revision, "modified": False}
    (tmp_path / "checkout/inner/file").write_text("two")
    assert git_state(tmp_path / "checkout") == {"revision": revision, "modified": True}
    assert git_state(tmp_path / "checkout/inner") is None  # a package that is installed inside of somebody's checkout
    assert git_state(tmp_path) is None


# What is listed.


def test_states(runs: Path) -> None:
    finished, stopped, died = (run_state(runs / name) for name in ("deep/er/finished", "stopped", "died"))
    test = json.loads((runs / "deep/er/finished/test.json").read_text())
    validations = read_step_log(runs / "deep/er/finished/validations.jsonl")
    assert finished.state == "finished"
    assert finished.model == "dare"
    assert finished.app == "slurm://torchx/17"
    assert (finished.step, finished.steps) == (test["steps"], test["steps"])
    assert finished.test_auc == test["auc"]
    assert finished.best_validation_auc == max(line["auc"] for line in validations)
    assert finished.samples_per_s
    assert finished.samples_per_s > 0
    assert (stopped.state, stopped.step, stopped.checkpoint_step, stopped.test_auc) == ("stopped", 5, 5, None)
    last = checkpoints_in(runs / "died/checkpoints")[-1].step
    assert last >= 4
    assert (died.state, died.checkpoint_step) == ("died", last)
    assert died.step is not None
    assert died.step >= last


def test_a_running_run_is_shown_and_not_disturbed(data: Path, tmp_path: Path) -> None:
    run = Run(1, small_settings("epochs=20"), data, tmp_path / "run", slow_steps)
    try:
        run.wait_for_step(10)
        for _ in range(20):
            state = run_state(run.folder)
            assert state.state == "running", state
        assert state.checkpoint_step
        assert state.model == "dare"
        run.terminate(0)
        run.finish()
    finally:
        run.kill()
    assert run_state(run.folder).state == "stopped"


def look(folder: Path, ready: Any) -> None:
    ready.set()
    while True:
        RunFolder(folder).is_locked()


def test_looking_never_hinders_a_start(tmp_path: Path, runs: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "settings.yaml").write_text("")
    context = multiprocessing.get_context("fork")
    ready = [context.Event() for _ in range(2)]
    lookers = [context.Process(target=look, args=(folder, event), daemon=True) for event in ready]
    for process in lookers:
        process.start()
    try:
        for event in ready:
            assert event.wait(PATIENCE_S)
        for _ in range(200):
            with RunFolder(folder).locked():
                assert RunFolder(folder).is_locked()
    finally:
        for process in lookers:
            process.kill()
            process.join()
    assert not RunFolder(folder).is_locked()


def test_a_second_trainer_is_still_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run").locked():
        (tmp_path / "run/settings.yaml").write_text("")
        with (
            pytest.raises(ValueError, match=r"another process is training in .*run"),
            RunFolder(tmp_path / "run").locked(),
        ):
            pass


def test_a_folder_that_was_made_for_nothing_goes(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run").locked():
        pass
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("settings.yaml", "epochs: none", "epochs: "),
        ("settings.yaml", "{", "settings cannot be read"),
        ("settings.yaml", None, "no settings.yaml"),
        ("test.json", "{", "test.json is damaged"),
        ("job.json", '{"starts": 7}', "job.json is damaged (starts is 7)"),
        ("job.json", '{"starts": []}', "job.json is damaged (no list of starts)"),
        ("job.json", "{}", "job.json is damaged (no starts)"),
        ("job.json", "\x00\x00", "job.json is damaged"),
        ("progress.json", "[]", "progress.json is damaged"),
        ("validations.jsonl", "\x00\n", "validations.jsonl is damaged"),
        ("validations.jsonl", '{"step": 3}\n', "validations.jsonl is damaged (a line without auc)"),
        ("progress.json", '{"step": "x"}', "progress.json is damaged (step is 'x')"),
        ("progress.json", '{"step": 1, "steps": 2}', "progress.json is damaged (no samples_per_s)"),
        ("test.json", '{"steps": 1, "checkpoint_step": 1, "auc": 0.5, "gauc": 0.5}', "is damaged (no log_loss)"),
        ("test.json", "ä".encode("latin-1"), "test.json is damaged"),
        ("settings.yaml", "ä: 1".encode("latin-1"), "settings.yaml: settings cannot be read"),
        ("validations.jsonl", json_line({"step": 3}), "validations.jsonl is damaged (a line without auc)"),
        ("validations.jsonl", "ä".encode("latin-1") + b"\n", "validations.jsonl is damaged"),
        ("job.json", Path("nowhere"), "job.json is missing"),
        ("test.json", Path("nowhere"), "test.json is missing"),
        ("validations.jsonl", Path("nowhere"), "validations.jsonl is missing"),
        ("settings.yaml", Path("nowhere"), "no settings.yaml"),
        ("checkpoints/step-000000000001", Path("nowhere"), None),
        ("checkpoints/step-x", "", "invalid literal"),
    ],
)
def test_a_damaged_run_is_a_line(
    name: str,
    content: str | bytes | Path | None,
    said: str | None,
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``content`` takes the place of a file's; a path: of a link's target; None: the file is gone."""
    subprocess.run(["cp", "-r", runs / "deep/er/finished", tmp_path / "bad"], check=True)
    subprocess.run(["cp", "-r", runs / "deep/er/finished", tmp_path / "good"], check=True)
    file = tmp_path / "bad" / name
    file.unlink(missing_ok=True)
    if isinstance(content, Path):
        file.symlink_to(content)
    elif content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    bad, good = listed(tmp_path, capsys)
    assert (bad["state"], good["state"]) == ("finished" if said is None else "damaged", "finished")
    if said is not None:
        assert said in bad["error"]
        assert "\n" not in bad["error"]


def test_a_folder_that_may_not_be_read_is_listed_as_damaged(runs: Path) -> None:
    if os.geteuid():
        pytest.skip("becoming another user needs root")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for run in ("a", "b", "c"):
            subprocess.run(["cp", "-r", runs / "stopped", folder / run], check=True)
        (folder / "a").chmod(0)
        (folder / "b/job.json").chmod(0)
        source, sink = os.pipe()
        if not (child := os.fork()):
            os.setuid(65534)
            states = [asdict(run_state(path)) for path in find_runs(folder)]
            os.write(sink, json.dumps(states).encode())
            os._exit(0)
        os.close(sink)
        with os.fdopen(source) as stream:
            found = json.loads(stream.read())
        os.waitpid(child, 0)
    assert {Path(each["run"]).name: each["state"] for each in found} == {"a": "damaged", "b": "damaged", "c": "stopped"}
    assert all("Permission denied" in each["error"] for each in found if each["state"] == "damaged")


def test_a_damaged_record_of_starts_is_refused_and_nothing_is_lost(runs: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", runs / "deep/er/finished", run], check=True)
    (run / "job.json").write_text("{}")
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    longer = Run(2, small_settings("epochs=2"), data, run)
    assert set(longer.wait()) == {1}
    assert "job.json is damaged" in longer.complaint()
    assert before == {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def test_a_run_that_was_killed_before_it_wrote_anything_has_died(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunFolder(tmp_path / "run").locked():
        assert run_state(tmp_path / "run").state == "running"
        (tmp_path / "kept").mkdir()
        (tmp_path / "kept/.lock").touch()
    assert listed(tmp_path, capsys)[0]["state"] == "died"
    assert "died; the same command begins anew" in dare(capsys, "runs", str(tmp_path))


def test_a_step_is_shown_that_is_as_new_as_the_last_checkpoint(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["cp", "-r", runs / "stopped", tmp_path / "run"], check=True)
    (tmp_path / "run/progress.json").write_text('{"step": 2, "steps": 30, "samples_per_s": 1.0}')
    assert run_state(tmp_path / "run").step == 5
    (tmp_path / "run/progress.json").unlink()
    assert run_state(tmp_path / "run").step == 5
    assert "None" not in dare(capsys, "runs", str(tmp_path))


def test_progress_is_told_between_points_of_the_curves(data: Path, tmp_path: Path) -> None:
    settings = small_settings("epochs=50", "log_every=100000", "checkpoint.every=100000", "validation.every=100000")
    run = Run(1, settings, data, tmp_path / "run", told_at_each_step)
    try:
        until = time.monotonic() + PATIENCE_S
        while (run_state(run.folder).step or 0) < 5:
            assert time.monotonic() < until, run.said()
            time.sleep(0.05)
    finally:
        run.kill()


def told_at_each_step(rank: int) -> None:
    from pipeline.train import reporting as report

    report.TELL_EVERY_S = 0.0


def listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    lines = dare(capsys, "runs", str(folder), "--json")
    return json.loads(lines.splitlines()[-1])["runs"]


def dare(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dare", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code == 0, end.value.code
    return capsys.readouterr().out


def test_the_list(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_runs(runs) == [runs / "deep/er/finished", runs / "died", runs / "stopped"]
    assert [run["run"] for run in listed(runs, capsys)] == [str(path) for path in find_runs(runs)]
    said = dare(capsys, "runs", str(runs))
    assert "slurm://torchx/17" in said
    assert "deep/er/finished" in said
    assert "stopped: stopped; the same command goes on after step 5" in said
    assert listed(runs / "stopped", capsys) == [asdict(run_state(runs / "stopped"))]


def test_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert dare(capsys, "runs", str(tmp_path)) == f"{tmp_path}: no runs\n"
    monkeypatch.setattr(sys, "argv", ["dare", "runs", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"dare: .*none: no such folder"):
        main()


def test_names_that_coincide_are_told_apart() -> None:
    assert distinct_names([Path("a/dare"), Path("a/twin")]) == ["dare", "twin"]
    assert distinct_names([Path("a/dare/1"), Path("b/dare/1"), Path("a/twin/2")]) == [
        "a/dare/1",
        "b/dare/1",
        "a/twin/2",
    ]
    assert distinct_names([Path("a/1"), Path("a/1")]) == ["1", "1"]


# Asking to stop.


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_saves_as_sigterm_does(ranks: int, data: Path, tmp_path: Path) -> None:
    run = Run(ranks, small_settings("epochs=50", "checkpoint.every=1000"), data, tmp_path / "run", slow_steps)
    run.wait_for_step(5)
    for process in run.processes:
        assert process.pid
        os.kill(process.pid, signal.SIGINT)
    run.finish()
    assert "asked to stop, saved at step" in run.said()
    assert run_state(run.folder).state == "stopped"
    assert run_state(run.folder).checkpoint_step == read_step_log(run.folder / "losses.jsonl")[-1]["step"]


def test_a_second_ctrl_c_ends_at_once(data: Path, tmp_path: Path) -> None:
    settings = small_settings("epochs=50", "checkpoint.every=1000")
    run = Run(1, settings, data, tmp_path / "run", pause_and_tell_signals, (6, tmp_path))
    run.wait_for_pause(tmp_path)
    (process,) = run.processes
    assert process.pid
    os.kill(process.pid, signal.SIGINT)
    until = time.monotonic() + PATIENCE_S
    while not (tmp_path / "signal").exists():  # two that come at once would be one
        assert time.monotonic() < until, run.said()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    assert run.wait() == [130]
    assert run.said().endswith("dare: interrupted\n")
    assert run_state(run.folder).state == "failed"


def pause_and_tell_signals(rank: int, step: int, folder: Path) -> None:
    from pipeline.train.trainer import StopSignal

    pause(rank, step, folder)
    receive = StopSignal._receive

    def told(self: StopSignal, *arguments: Any) -> None:
        receive(self, *arguments)
        (folder / "signal").touch()

    StopSignal._receive = told


def test_a_lost_rank_is_recorded(data: Path, tmp_path: Path) -> None:
    run = Run(2, small_settings("epochs=50"), data, tmp_path / "run")
    run.wait_for_step(5)
    run.kill(1)
    run.wait()
    state = run_state(run.folder)
    assert state.state == "failed"
    assert state.error
    assert state.error.startswith("rank 0 of 2 has lost another one (")
    assert state.error.endswith("the same command goes on from there")
