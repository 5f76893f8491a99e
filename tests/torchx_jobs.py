"""Jobs that torchx starts: waiting for what they write, finding their processes."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from pipeline.runs.run_folder import read_step_log
from tests.datasets import random_users, write_dataset
from tests.launcher import PATIENCE_S
from tests.runs import SMALL

CHECKPOINT_EVERY = 4
"""Steps between two checkpoints in the settings ``SMALL``."""


def training(data: Path, run: Path, *overrides: str) -> list[str]:
    """Arguments of a small `dare train`."""
    return ["--data", str(data), "--run", str(run), *SMALL, *overrides]


def small_data(folder: Path) -> Path:
    """A data set of about five global batches an epoch, for two processes."""
    write_dataset(folder, random_users(160))
    return folder


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """Poll until ``condition`` holds; what it gave."""
    until = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < until, f"waited {PATIENCE_S:.0f} s for {what}"
        time.sleep(0.02)
    return found


def last_step(run: Path) -> int:
    """The last step in the log of losses, which is flushed now and then."""
    log = read_step_log(run / "losses.jsonl") if (run / "losses.jsonl").exists() else []
    return log[-1]["step"] if log else 0


def past_a_checkpoint(run: Path, step: int = 0) -> bool:
    """Whether the run has a whole checkpoint, and steps after ``CHECKPOINT_EVERY + step`` in its log."""
    return last_step(run) > CHECKPOINT_EVERY + step and any((run / "checkpoints").glob("step-*"))


def rank_process(run: Path, rank: int) -> psutil.Process:
    """The process of a rank that trains in ``run``."""
    for process in psutil.process_iter(["cmdline", "environ"]):
        command, environment = process.info["cmdline"] or [], process.info["environ"] or {}
        if str(run) in command and environment.get("RANK") == str(rank) and "torch.distributed.run" not in command:
            return process
    raise AssertionError(f"no process of rank {rank} in {run}")


def written(run: Path) -> tuple[str, str, str]:
    """Losses, validations and test, as they stand in a run's files."""
    return tuple((run / name).read_text() for name in ("losses.jsonl", "validations.jsonl", "test.json"))
