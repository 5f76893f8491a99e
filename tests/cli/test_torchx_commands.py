"""torchx's command line with components of ours: mistakes, clients that are missing, jobs on this machine, kills."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torchx.cli.argparse_util import ArgOnceAction, torchxconfig
from torchx.cli.main import main
from torchx.runner import Runner
from torchx.schedulers import DEFAULT_SCHEDULER_MODULES, get_scheduler_factories
from torchx.specs import AppState

from pipeline.runs.listing import run_state
from tests.launcher import PATIENCE_S
from tests.torchx_jobs import last_step, past_a_checkpoint, rank_process, small_data, training, wait_until, written

REPOSITORY = Path(__file__).parents[2]
COMPONENTS = ("train", "online", "evaluate", "prepare", "plan")
MOUNTS = "type=bind,src=/data,dst=/data,readonly,type=volume,src=runs,dst=/runs"

pytestmark = pytest.mark.usefixtures("stand_ins")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--name", "My_Job"], "--name My_Job: not a name for a job"),
        (["-j", "x"], "-j x: nodes, or nodes x processes"),
        (["--", "--data", "d", "--run", "r", "model=tree"], "dare train: model.name: must be one of dare,"),
    ],
)
def test_the_command_line_tells_a_mistake_without_a_traceback(arguments: list[str], said: str) -> None:
    told = subprocess.run(torchx("run", "dare.train", *arguments), cwd=REPOSITORY, capture_output=True, text=True)
    assert told.returncode == 1
    assert said in told.stderr
    assert "Traceback" not in told.stderr


@pytest.fixture
def fresh_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchx forget: it remembers which options a process has seen."""
    for kind in (torchxconfig, ArgOnceAction):
        monkeypatch.setattr(kind, "called_args", set())


@pytest.mark.usefixtures("fresh_command_line")
def test_a_client_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    assert told_by_torchx("kubernetes", capsys, "dare.plan", "--image", "x") == (
        "torchx: kubernetes: needs a package that is not installed: pip install kubernetes\n"
    )


@pytest.mark.usefixtures("fresh_command_line")
def test_a_slurm_that_is_not_reachable_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bin/sbatch").write_text("#!/bin/bash\nexit 1\n")
    (tmp_path / "bin/sbatch").chmod(0o755)
    assert told_by_torchx("slurm", capsys).startswith("torchx: slurm: sbatch ended with 1; is the cluster up")


@pytest.mark.usefixtures("fresh_command_line")
def test_a_machine_without_slurm_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert told_by_torchx("slurm", capsys) == "torchx: slurm: sbatch is not on this machine\n"


@pytest.mark.usefixtures("fresh_command_line")
@pytest.mark.parametrize("scheduler", ["local_docker", "kubernetes", "aws_batch"])
@pytest.mark.parametrize("component", ["dare.plan", "jobs/torchx/components.py:plan"])
def test_a_container_without_an_image_is_one_line(
    scheduler: str, component: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = f"torchx: {scheduler}: starts containers; say with --image which one, after {component} "
    assert told_by_torchx(scheduler, capsys, component, "--", "--image", "of the command itself").startswith(said)


@pytest.mark.usefixtures("fresh_command_line")
def test_an_image_may_stand_in_the_settings_of_torchx(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "settings").write_text("[component:dare.plan]\nimage = dare:cpu\n")
    monkeypatch.setenv("TORCHXCONFIG", str(tmp_path / "settings"))
    main(["run", "--dryrun", "-s", "local_docker", "--workspace", "", "dare.plan"])
    assert "'image': 'dare:cpu'" in capsys.readouterr().out


@pytest.mark.usefixtures("fresh_command_line")
def test_a_server_that_is_not_reachable_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    said = told_by_torchx("local_docker", capsys, "dare.plan", "--image", "x")
    assert said.startswith("torchx: local_docker: Docker is not reachable, or refuses: ")
    assert said.count("\n") == 1


@pytest.mark.usefixtures("fresh_command_line")
@pytest.mark.parametrize("command", ["status", "log", "cancel"])
def test_other_commands_tell_it_too(command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bin/sacct").write_text("#!/bin/bash\nexit 1\n")
    (tmp_path / "bin/sacct").chmod(0o755)
    with pytest.raises(SystemExit) as end:
        main([command, "slurm://torchx/7"])
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("torchx: slurm: sacct ended with 1; is the cluster up")


@pytest.mark.parametrize(
    ("told", "state", "replicas"),
    [
        ("7+0|train-0|CANCELLED by 0\n7+1|train-1|COMPLETED\n", AppState.CANCELLED, 2),
        ("7+0|train-0|COMPLETED\n7+1|train-1|FAILED\n", AppState.FAILED, 2),
        ("7+0|train-0|COMPLETED\n7+1|train-1|RUNNING\n", AppState.RUNNING, 2),
        ("7+0|train-0|REQUEUED\n7+1|train-1|PENDING\n", AppState.PENDING, 2),
        ("7|plan-0|COMPLETED\n", AppState.SUCCEEDED, 1),
        ("7|allocation|SOMETHING_NEW\n", AppState.UNKNOWN, 0),
    ],
)
def test_states_of_slurm(runner: Runner, tmp_path: Path, told: str, state: AppState, replicas: int) -> None:
    (tmp_path / "bin/sacct").write_text(f"#!/bin/bash\necho -n '{told}'\n")
    (tmp_path / "bin/sacct").chmod(0o755)
    status = runner.describe("slurm://torchx/7"), runner.status("slurm://torchx/7")
    assert status[1] is not None
    assert status[1].state == state
    assert sum(len(role.replicas) for role in status[1].roles) == replicas
    (tmp_path / "bin/sacct").write_text("#!/bin/bash\n")
    assert runner.status("slurm://torchx/7") is None


def test_all_schedulers_that_can_be_loaded_are_there() -> None:
    assert set(get_scheduler_factories()) == set(DEFAULT_SCHEDULER_MODULES) - {"ray"}


def told_by_torchx(scheduler: str, capsys: pytest.CaptureFixture[str], *component: str) -> str:
    options = ["-s", scheduler, "--workspace", "", *(["-cfg", "queue=q"] if scheduler == "kubernetes" else [])]
    with pytest.raises(SystemExit) as end:
        main(["run", *options, *(component or ["dare.plan"])])
    assert end.value.code == 1
    return capsys.readouterr().err


def test_a_single_process_job_runs_at_once_in_the_repository(tmp_path: Path) -> None:
    told = subprocess.run(
        torchx("run", *logs_in(tmp_path), "dare.plan", "--", "--topology", "none", "sizes.items=1000"),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 1
    assert "dare: --topology none: unknown" in told.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("killed") / "data")


LONG = ("epochs=6", "validation.every=15")
STEPS = 30


@pytest.fixture(scope="module")
def undisturbed(data: Path) -> Path:
    run = data.with_name("undisturbed")
    subprocess.run(train_locally(data, run), cwd=REPOSITORY, check=True, capture_output=True, timeout=PATIENCE_S)
    assert last_step(run) == STEPS
    return run


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(10))
def test_after_kill_9_of_a_rank_training_goes_on_to_the_same_end(data: Path, undisturbed: Path, attempt: int) -> None:
    run = data.with_name(f"killed-{attempt}")
    job = subprocess.Popen(train_locally(data, run), cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: past_a_checkpoint(run, attempt), "some steps")
        os.kill(rank_process(run, attempt % 2).pid, signal.SIGKILL)
        _, said = job.communicate(timeout=PATIENCE_S)
    finally:
        if job.poll() is None:
            job.send_signal(signal.SIGINT)
            job.wait(PATIENCE_S)
    assert job.returncode == 0, said
    assert "goes on after step" in said
    assert written(run) == written(undisturbed)
    assert json.loads((run / "test.json").read_text())["steps"] == STEPS


@pytest.mark.slow
def test_ctrl_c_of_torchx_lets_training_save(data: Path) -> None:
    run = data.with_name("interrupted")
    job = subprocess.Popen([*train_locally(data, run), "epochs=500"], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: last_step(run), "some steps")
        job.send_signal(signal.SIGINT)
        _, said = job.communicate(timeout=PATIENCE_S)
    finally:
        job.kill()
    assert job.returncode == 130
    assert said.endswith("torchx: local_cwd: interrupted, and so is the job\n")
    assert "Traceback" not in said
    wait_until(lambda: run_state(run).state == "stopped", "its checkpoint")
    assert run_state(run).checkpoint_step


def torchx(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torchx.cli.main", *arguments]


def logs_in(folder: Path) -> list[str]:
    return ["-s", "local_cwd", "-cfg", f"log_dir={folder}"]


def train_locally(data: Path, run: Path) -> list[str]:
    return torchx("run", *logs_in(data.with_name("logs")), "dare.train", "--", *training(data, run, *LONG))
