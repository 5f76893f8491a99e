"""A user's mistake is one line and exit code 1; a fault of the program shows its trace, says so, and exits with 70."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torchx.cli.main import main as torchx

from embeddings.distributed.process_group import process_group
from jobs.cli import main
from jobs.torchx import launch
from pipeline.errors import FAULT, FAULT_LINE, error_line, printable
from pipeline.runs.listing import run_state
from schemas.errors import UserError
from schemas.settings import load_settings
from schemas.train import TrainSettings
from tests.runs import Run, small_settings

CPU = torch.device("cpu")
EVENTS = "user_id,item_id,category_id,timestamp\n1,2,3,4\n"


@pytest.fixture(scope="module")
def data(few_users: Path) -> Path:
    return few_users


def is_told_as_a_fault(said: str, error: str) -> bool:
    """Whether a trace of ``error`` was shown, once, and then the line that it is a fault."""
    lines = said.splitlines()
    assert said.count("Traceback (most recent call last)") == 1, said
    assert lines[-1] == f"dare: {FAULT_LINE}", said
    return lines[-2].startswith(error)


def divide(*_: Any, **__: Any) -> float:
    return 1 / 0


def zip_unequal(*_: Any, **__: Any) -> list[Any]:
    return list(zip([1], [], strict=True))


@pytest.mark.parametrize(
    ("fault", "error"), [(divide, "ZeroDivisionError"), (zip_unequal, "ValueError: zip() argument 2 is shorter")]
)
def test_a_fault_of_prepare(
    fault: Any, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "events.csv").write_text(EVENTS)
    monkeypatch.setattr("pipeline.ingest.prepare.prepare", fault)
    arguments = ["prepare", "--events", str(tmp_path / "events.csv"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["dare", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == FAULT
    assert is_told_as_a_fault(capsys.readouterr().err, error)


def sabotage(rank: int, where: int, fault: Any) -> None:
    """Put a fault of ours into the third step of rank ``where``."""
    from pipeline.train import trainer

    agree = trainer.agree

    def faulty(step: int, *arguments: Any) -> Any:
        return fault() if step == 3 and rank == where else agree(step, *arguments)

    trainer.agree = faulty


@pytest.mark.parametrize(("ranks", "where"), [(1, 0), (2, 0), (2, 1)])
def test_a_fault_of_a_rank(ranks: int, where: int, data: Path, tmp_path: Path) -> None:
    run = Run(ranks, small_settings(), data, tmp_path / "run", sabotage, (where, zip_unequal))
    codes = run.wait()
    assert codes[where] == FAULT
    assert 0 not in codes
    assert is_told_as_a_fault(run.said(where), "ValueError: zip() argument 2 is shorter")
    # Where the first rank fails, the store goes with it, and the others cannot know that it has told why.
    others = [run.said(rank) for rank in range(ranks) if rank != where]
    assert not any("Traceback" in said or FAULT_LINE in said for said in others)
    state = run_state(run.folder)
    assert state.state == "failed"
    assert state.error is not None
    assert "\n" not in state.error


@pytest.mark.slow
def test_a_fault_under_torchrun(data: Path, tmp_path: Path) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(
        "import os, jobs.cli, tests.cli.test_faults as faults\n"
        "faults.sabotage(int(os.environ['RANK']), 1, faults.divide)\n"
        "jobs.cli.main()\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    training = ["train", "--data", str(data), "--run", str(tmp_path / "run"), "stream.batch_size=24"]
    done = subprocess.run(
        [*launcher, str(script), *training],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stderr.count(f"dare: {FAULT_LINE}") == 1, done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert "exitcode  : 70" in done.stderr


def test_a_fault_of_a_component(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(launch, "node", divide)
    with pytest.raises(SystemExit) as end:
        torchx(["run", "-s", "local_cwd", "--workspace", "", "dare.plan"])
    assert end.value.code == FAULT
    assert is_told_as_a_fault(capsys.readouterr().err, "ZeroDivisionError")


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_trace_of_a_mistake_is_shown_on_demand(ranks: int, data: Path, tmp_path: Path) -> None:
    run = Run(ranks, small_settings("model.name=tree"), data, tmp_path / "run", with_traces)
    assert set(run.wait()) == {1}
    assert run.said().count("Traceback (most recent call last)") == 1
    assert run.said().splitlines()[-1].startswith("dare: model.name: must be one of")
    assert FAULT_LINE not in run.said()


def with_traces(rank: int) -> None:
    os.environ["DARE_TRACEBACK"] = "1"


def test_the_trace_of_a_mistake_in_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dare", "runs", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"^dare: .*no such folder$"):
        main()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("DARE_TRACEBACK", "1")
    with pytest.raises(SystemExit, match=r"^dare: .*no such folder$"):
        main()
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("a\n line"), "a line"),
        (OSError(errno.ENOSPC, "No space left on device", "/data"), "/data: no space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk: no space left"),
        (OSError(errno.EACCES, "Permission denied", "/data"), "/data: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "/data"), "/data: Read-only file system"),
        (KeyboardInterrupt(), "interrupted"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), None),
        (OSError("without a number"), None),
        (ValueError("zip() argument 2 is shorter than argument 1"), None),
        (KeyError("x"), None),
        (AssertionError(), None),
    ],
)
def test_whose_error_it_is(error: BaseException, line: str | None) -> None:
    assert error_line(error) == line


def test_ranks_that_cannot_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"^WORLD_SIZE is set, as by a launcher of ranks, but "), process_group(CPU):
        pass


def test_settings_that_are_no_text_or_no_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (b"\xff\xfe\x00", b"seed: 2026-13-45"):
        (tmp_path / "settings.yaml").write_bytes(content)
        monkeypatch.setattr(sys, "argv", ["dare", "plan", "--config", str(tmp_path / "settings.yaml")])
        with pytest.raises(SystemExit, match=r"^dare: .*settings cannot be read: "):
            main()


def test_overrides_that_fit_no_tree_are_a_mistake() -> None:
    with pytest.raises(UserError, match=r"^settings cannot be read: "):
        load_settings(TrainSettings, overrides=["stream=[1]", "stream.sequences.x.length=2"])


NAME = "a\n\x1b[31m[red]b\u202ec\udc80\x07"
"""What a file may be called: a line's end, a colour, markup, a change of direction, a byte that is no text, a bell."""
SHOWN = r"\x1b[31m[red]b\u202ec\udc80\x07"


def test_names_cannot_forge_what_is_shown(tmp_path: Path) -> None:
    assert printable(NAME) == r"a\n" + SHOWN
    assert printable("Größe 数 é") == "Größe 数 é"
    line = error_line(UserError(f"{NAME}: not there"))
    assert line == f"a {SHOWN}: not there"
    folder = tmp_path / NAME
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "runs", str(folder)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().splitlines() == [rf"{tmp_path}/a\n{SHOWN}: no runs"]


def test_output_on_a_full_disk_is_a_line(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "jobs.cli", "runs", str(tmp_path)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr in ("dare: standard output: no space left\n", "dare: the disk: no space left\n")
