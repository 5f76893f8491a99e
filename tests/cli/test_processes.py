"""Real processes that are stopped, interrupted, orphaned or left alone: each ends with one line and its exit code."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import tests.launcher
from embeddings.distributed.process_group import MEETING_SECONDS, rank_environment, seconds_of
from embeddings.distributed.rank_watch import HANG_SECONDS
from pipeline.runs.listing import run_state
from schemas.errors import UserError
from tests.launcher import PATIENCE_S, free_port, wait
from tests.runs import SMALL, Run, pause, slow_steps, small_settings

ROOT = Path(__file__).parents[2]
LIMIT_S = 2


def start(command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and standard error."""
    _, said = process.communicate(timeout=PATIENCE_S)
    return process.returncode, said


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_hangs_is_noticed_by_the_others(
    stopped: int, few_users: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HANG_SECONDS, str(LIMIT_S))
    run = Run(2, small_settings("epochs=900"), few_users, tmp_path / "run", with_limit, (LIMIT_S,))
    run.wait_for_step(5)
    os.kill(run.processes[stopped].pid or 0, signal.SIGSTOP)
    run.processes[1 - stopped].join(PATIENCE_S)
    assert run.processes[1 - stopped].exitcode == 1
    (line,) = [line for line in run.said(1 - stopped).splitlines() if line.startswith("dare: ")]
    assert line.startswith(f"dare: rank {stopped} of 2"), line
    assert f"has not answered for {LIMIT_S} s" in line
    os.kill(run.processes[stopped].pid or 0, signal.SIGCONT)
    assert run.wait() == [1, 1]
    assert "Traceback" not in run.said()
    assert len([line for line in run.said(stopped).splitlines() if line.startswith("dare: ")]) <= 1
    state = run_state(run.folder)
    assert state.state == "failed"
    assert state.error is not None
    assert stopped == 0 or state.error.startswith("rank 1 of 2")


def with_limit(rank: int, seconds: int) -> None:
    os.environ[HANG_SECONDS] = str(seconds)
    slow_steps(rank)


@pytest.mark.slow
def test_ranks_that_are_busy_for_longer_than_the_limit_are_not_given_up(few_users: Path, tmp_path: Path) -> None:
    run = Run(2, small_settings(), few_users, tmp_path / "run", busy, (4 * LIMIT_S,))
    run.finish()


def busy(rank: int, seconds: int) -> None:
    """Sabotage: the second rank takes long for its third step, as for compiling or a slow disk."""
    os.environ[HANG_SECONDS] = str(LIMIT_S)
    from pipeline.train import trainer

    agree = trainer.agree

    def slowly(step: int, *arguments: object) -> object:
        if step == 3 and rank == 1:
            time.sleep(seconds)
        return agree(step, *arguments)  # type: ignore[arg-type]

    trainer.agree = slowly  # type: ignore[assignment]


def test_a_terminal_that_closes_lets_training_save(few_users: Path, tmp_path: Path) -> None:
    run = Run(1, small_settings("epochs=900"), few_users, tmp_path / "run", slow_steps)
    run.wait_for_step(5)
    os.kill(run.processes[0].pid or 0, signal.SIGHUP)
    assert run.wait() == [0]
    assert "asked to stop, saved at step " in run.said()


def test_nohup_keeps_training_going(few_users: Path, tmp_path: Path) -> None:
    (tmp_path / "pause").mkdir()
    run = Run(1, small_settings(), few_users, tmp_path / "run", without_hangups, (tmp_path / "pause",))
    run.wait_for_pause(tmp_path / "pause")
    os.kill(run.processes[0].pid or 0, signal.SIGHUP)
    (tmp_path / "pause" / "go").touch()
    run.finish()
    assert run_state(run.folder).state == "finished"


def without_hangups(rank: int, folder: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    pause(rank, 3, folder)


def forked(folder: Path, environment: dict[str, str], *arguments: object) -> tuple[int | None, str]:
    """`dare` with an environment, in a process that need not load its modules: exit code and standard error."""
    return outcomes(folder, [environment], *arguments)[0]


def outcomes(folder: Path, environments: list[dict[str, str]], *arguments: object) -> list[tuple[int | None, str]]:
    files = [folder / f"stderr-{number}" for number in range(len(environments))]
    words = [str(argument) for argument in arguments]
    processes = [
        tests.launcher.start(_dare, environment, words, file)
        for environment, file in zip(environments, files, strict=True)
    ]
    return list(zip(wait(processes), (file.read_text() for file in files), strict=True))


def _dare(environment: dict[str, str], arguments: list[str], errors: Path) -> None:
    from jobs.cli import main

    # The file descriptor: what C++ prints is a line too many as well.
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ |= environment
    sys.argv = ["dare", *arguments]
    main()


@pytest.mark.parametrize("rank", [0, 1])
def test_variables_of_a_launcher_that_are_left_over(rank: int, few_users: Path, tmp_path: Path) -> None:
    left_over = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = ("train", "--data", few_users, "--run", tmp_path / "run")
    code, said = forked(tmp_path, {**left_over, MEETING_SECONDS: "1"}, *command)
    assert code == 1
    # In a fresh process torch's own lines are switched off before it is loaded; here it is loaded already.
    (line,) = [line for line in said.splitlines() if line.startswith("dare: ")]
    for name in left_over:
        assert name in line
    assert "unset them" in line
    assert MEETING_SECONDS in line


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "1", "RANK": "0"}, {"GLOO_SOCKET_IFNAME": "eth99"}])
def test_a_rank_alone_needs_no_port_and_no_interface(
    environment: dict[str, str], few_users: Path, tmp_path: Path
) -> None:
    code, said = forked(tmp_path, environment, "train", "--data", few_users, "--run", tmp_path / "run", *SMALL)
    assert code == 0, said


def test_ranks_name_the_variable_of_an_interface_that_is_not_there(few_users: Path, tmp_path: Path) -> None:
    port = free_port()
    environments = [rank_environment(rank, 2, port) | {"GLOO_SOCKET_IFNAME": "eth99"} for rank in range(2)]
    ended = outcomes(tmp_path, environments, "train", "--data", few_users, "--run", tmp_path / "run", *SMALL)
    assert [code for code, _ in ended] == [1, 1]
    (line,) = "".join(said for _, said in ended).splitlines()
    assert line.startswith("dare: GLOO_SOCKET_IFNAME=eth99: ")


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_time_that_is_none_is_a_mistake(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HANG_SECONDS, text)
    with pytest.raises(UserError, match=f"^{HANG_SECONDS}={text}: "):
        seconds_of(HANG_SECONDS, 1.0)


@pytest.mark.parametrize(
    "after_s", [1.0, pytest.param(0.1, marks=pytest.mark.slow), pytest.param(6.0, marks=pytest.mark.slow)]
)
def test_a_launcher_that_is_killed_leaves_no_rank_behind(after_s: float, few_users: Path, tmp_path: Path) -> None:
    launcher = start(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--"),
            *("jobs.cli", "train", "--data", str(few_users), "--run", str(tmp_path / "run"), *SMALL, "epochs=900"),
        ]
    )
    ranks = wait_for(lambda: children_of(launcher.pid), 2)
    time.sleep(after_s)
    launcher.kill()
    launcher.communicate(timeout=PATIENCE_S)
    until = time.monotonic() + PATIENCE_S
    while any(is_alive(rank) for rank in ranks):
        assert time.monotonic() < until
        time.sleep(0.1)


def wait_for(look: object, count: int) -> list[int]:
    until = time.monotonic() + PATIENCE_S
    while len(found := look()) < count:  # type: ignore[operator]
        assert time.monotonic() < until
        time.sleep(0.05)
    return found


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


COMMANDS = {
    "train": ["train", "--data", "{data}", "--run", "{folder}/run", *SMALL, "epochs=900"],
    "stream": ["stream", "{data}", "--split", "train"],
    "inspect": ["inspect", "{data}"],
    "plan": ["plan", "--data", "{data}"],
    "synth": ["synth", "--out", "{folder}/synth.parquet", "events=20000000"],
    "runs": ["runs", "{folder}"],
    "models": ["models"],
}


OFTEN_RUN = ("train", "synth")


@pytest.mark.parametrize(
    "command", [name if name in OFTEN_RUN else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS]
)
def test_an_interrupt_at_any_moment_is_one_line(command: str, few_users: Path, tmp_path: Path) -> None:
    chance = random.Random(command)
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        words = [word.format(data=few_users, folder=folder) for word in COMMANDS[command]]
        process = start([sys.executable, "-m", "jobs.cli", *words])
        # Later than Python's own start, which no program can help with.
        time.sleep(0.15 + 3 * chance.random())
        process.send_signal(signal.SIGINT)
        code, said = ended(process)
        if code == 0:  # it was done before
            continue
        assert code == 130, said
        assert "Traceback" not in said
        assert [line for line in said.splitlines() if "interrupted" in line or "asked to stop" in line], said
