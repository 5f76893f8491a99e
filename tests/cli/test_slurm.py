"""Jobs on a real Slurm of two nodes, which is brought up on this machine; `make test-slurm`."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torchx.runner import Runner, get_runner
from torchx.schedulers.api import Stream
from torchx.specs import AppState, is_terminal, parse_app_handle

from pipeline.runs.listing import run_state
from tests.launcher import PATIENCE_S
from tests.torchx_jobs import last_step, past_a_checkpoint, rank_process, small_data, training, wait_until, written

SCRIPTS = Path(__file__).parents[2] / "jobs/slurm"
DAEMONS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd")

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        not all(map(shutil.which, DAEMONS)) or os.geteuid() != 0,
        reason="needs root and `apt-get install slurm-wlm munge slurmdbd mariadb-server`",
    ),
]


@pytest.fixture(scope="module", autouse=True)
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("slurm")
    environment = os.environ | {"CORES_PER_NODE": "4"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        # Slurm puts a job's logs where it was submitted.
        patch.chdir(tmp_path_factory.mktemp("jobs"))
        try:
            subprocess.run([SCRIPTS / "up.sh", folder], env=environment, check=True, timeout=PATIENCE_S)
            yield
        finally:
            subprocess.run([SCRIPTS / "down.sh", folder], check=True, timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def runner(slurm: None) -> Iterator[Runner]:
    with get_runner() as it:
        yield it


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("data") / "data")


def submit(runner: Runner, port: int, arguments: list[str], *options: str) -> str:
    """Two nodes of one process each."""
    place = ["-j", "2x1", "--cpu", "1", "--memMB", "1024", "--rdzv_port", str(port)]
    return runner.run_component("dare.train", [*place, *options, "--", *arguments], "slurm")


def state(runner: Runner, handle: str) -> AppState:
    status = runner.status(handle)
    return status.state if status else AppState.UNKNOWN


def listed(runner: Runner, handle: str) -> AppState:
    """The state of a job in `torchx list`."""
    return {app.app_id: app.state for app in runner.list("slurm")}[parse_app_handle(handle)[2]]


def end_of(runner: Runner, handle: str) -> AppState:
    wait_until(lambda: is_terminal(state(runner, handle)), f"the end of {handle}")
    return state(runner, handle)


def started_again(runner: Runner, handle: str) -> bool:
    """Whether a queued job has started. Slurm looks at jobs of several nodes only when the queue has changed."""
    job = parse_app_handle(handle)[2]
    subprocess.run(["scontrol", "update", f"jobid={job}", "Comment=still here"], check=True)
    time.sleep(1)
    return state(runner, handle) != AppState.PENDING


def log_of(runner: Runner, handle: str, stream: Stream) -> str:
    """The log of both nodes: either may have the first rank."""
    return "".join(line for node in (0, 1) for line in runner.log_lines(handle, "train", node, streams=stream))


@pytest.fixture(scope="module")
def undisturbed(runner: Runner, data: Path) -> Path:
    """A run, with another beside it that is cancelled."""
    run, other = data.with_name("undisturbed"), data.with_name("cancelled")
    handle = submit(runner, 29511, training(data, run, "epochs=4"))
    doomed = submit(runner, 29512, training(data, other, "epochs=500"))
    wait_until(lambda: state(runner, handle) == AppState.RUNNING, "the start")
    wait_until(lambda: last_step(other), "steps of the other job")
    runner.cancel(doomed)
    assert end_of(runner, doomed) == listed(runner, doomed) == AppState.CANCELLED
    wait_until(lambda: "asked to stop, saved" in log_of(runner, doomed, Stream.STDERR), "its checkpoint")
    assert end_of(runner, handle) == AppState.SUCCEEDED
    assert "begins, 20 steps on 2 processes" in log_of(runner, handle, Stream.STDERR)
    assert "test of the best checkpoint" in log_of(runner, handle, Stream.STDOUT)
    assert listed(runner, handle) == AppState.SUCCEEDED
    assert not (other / "test.json").exists()
    ended = {path: run_state(path) for path in (run, other)}
    assert [(state.state, state.app) for state in ended.values()] == [("finished", handle), ("stopped", doomed)]
    return run


def test_two_nodes_train_while_another_job_is_cancelled(undisturbed: Path) -> None:
    assert last_step(undisturbed) == 20


def test_a_requeued_job_goes_on_from_its_checkpoint(runner: Runner, data: Path, undisturbed: Path) -> None:
    run = data.with_name("requeued")
    options = ["--max_restarts", "0", "--max_retries", "1"]
    handle = submit(runner, 29513, training(data, run, "epochs=4"), *options)
    wait_until(lambda: past_a_checkpoint(run), "some steps")
    os.kill(rank_process(run, 1).pid, signal.SIGKILL)
    wait_until(lambda: state(runner, handle) == AppState.PENDING, "the job in the queue again")
    wait_until(lambda: started_again(runner, handle), "its second start")
    assert end_of(runner, handle) == AppState.SUCCEEDED
    assert "goes on after step" in log_of(runner, handle, Stream.STDERR)
    assert written(run) == written(undisturbed)


def test_ranks_of_several_nodes_are_started_again_in_place(runner: Runner, data: Path, undisturbed: Path) -> None:
    run = data.with_name("restarted")
    handle = submit(runner, 29514, training(data, run, "epochs=4"))
    wait_until(lambda: past_a_checkpoint(run), "some steps")
    os.kill(rank_process(run, 1).pid, signal.SIGKILL)
    assert end_of(runner, handle) == AppState.SUCCEEDED
    assert "goes on after step" in log_of(runner, handle, Stream.STDERR)
    assert written(run) == written(undisturbed)
