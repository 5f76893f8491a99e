"""Real training runs for tests: processes that can be killed, in a folder that can be compared.

They are forked from a server that has imported what they need, and end as `dare train` does.
"""

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from pipeline.runs.run_folder import read_step_log
from schemas.settings import load_settings
from schemas.train import TrainSettings
from tests.launcher import PRELOADED

SMALL = (
    "epochs=2",
    "stream.batch_size=24",
    "stream.history_length=12",
    "stream.shuffle_memory=20000",
    "model.retrieved.history=4",
    "model.attention.dim=4",
    "model.representation.dim=8",
    "model.hidden=[16]",
    "validation.every=9",
    "checkpoint.every=4",
    "log_every=5",
)


def small_settings(*overrides: str) -> TrainSettings:
    return load_settings(TrainSettings, [], [*SMALL, *overrides])


class Run:
    """A run that has been started."""

    def __init__(
        self,
        ranks: int,
        settings: TrainSettings,
        data: Path,
        folder: Path,
        sabotage: Callable[..., None] | None = None,
        arguments: tuple[Any, ...] = (),
    ) -> None:
        """``sabotage(rank, *arguments)`` is called on each rank before it begins."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder = folder
        self._said = tempfile.TemporaryDirectory()  # not beside the run, whose disk may be full
        self._errors = [Path(self._said.name) / f"{rank}.err" for rank in range(ranks)]
        self.processes: list[BaseProcess] = [
            context.Process(
                target=_rank, args=(rank, ranks, port, self._errors[rank], settings, data, folder, sabotage, arguments)
            )
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout: float = 100) -> list[int | None]:
        """Exit codes; processes that do not end are killed."""
        until = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def finish(self, timeout: float = 100) -> "Run":
        """Wait for an end without errors."""
        codes = self.wait(timeout)
        assert set(codes) == {0}, (codes, self.said())
        return self

    def kill(self, *ranks: int) -> None:
        """SIGKILL some ranks, or all."""
        for rank, process in enumerate(self.processes):
            if not ranks or rank in ranks:
                process.kill()
        if not ranks:
            for process in self.processes:
                process.join()

    def terminate(self, rank: int) -> None:
        """SIGTERM a rank."""
        assert self.processes[rank].pid
        os.kill(self.processes[rank].pid, signal.SIGTERM)

    def wait_for_step(self, step: int, timeout: float = 60) -> None:
        """Wait until the log of losses, which is flushed now and then, has reached ``step``."""
        until = time.monotonic() + timeout
        while not (log := read_step_log(self.folder / "losses.jsonl")) or log[-1]["step"] < step:
            assert time.monotonic() < until, f"step {step} not reached: {self.said()}"
            assert any(process.is_alive() for process in self.processes), self.said()
            time.sleep(0.01)

    def said(self, *ranks: int) -> str:
        """Standard error of some ranks, or of all."""
        files = [self._errors[rank] for rank in ranks] or self._errors
        return "".join(path.read_text() for path in files if path.exists())

    def complaint(self) -> str:
        """The one line that tells why it failed."""
        lines = [line for line in self.said().splitlines() if line.startswith("dare: ")]
        assert len(lines) == 1, self.said()
        assert "Traceback" not in self.said()
        return lines[0]

    def logs(self) -> tuple[str, str]:
        """Losses and validations, as they stand in the files."""
        return (self.folder / "losses.jsonl").read_text(), (self.folder / "validations.jsonl").read_text()


def _rank(
    rank: int,
    ranks: int,
    port: int,
    errors: Path,
    settings: TrainSettings,
    data: Path,
    folder: Path,
    sabotage: Callable[..., None] | None,
    arguments: tuple[Any, ...],
) -> None:
    from jobs.ranks import on_all_ranks
    from pipeline.progress import log_to_standard_error
    from pipeline.train.run import train

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    sys.stderr = errors.open("w", buffering=1)
    log_to_standard_error()
    if sabotage:
        sabotage(rank, *arguments)
    on_all_ranks(lambda device: train(settings, data, folder, device))


def run_dare(folder: Path, *arguments: object) -> tuple[int | None, str, str]:
    """`dare` in a process of its own, with files in ``folder``: exit code, standard output, standard error."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    files = folder / "stdout", folder / "stderr"
    process = context.Process(target=_dare, args=([str(argument) for argument in arguments], *files))
    process.start()
    process.join(100)
    process.kill()
    return process.exitcode, files[0].read_text(), files[1].read_text()


def _dare(arguments: list[str], output: Path, errors: Path) -> None:
    from jobs.cli import main

    torch.set_num_threads(1)
    sys.argv = ["dare", *arguments]
    sys.stdout, sys.stderr = output.open("w", buffering=1), errors.open("w", buffering=1)
    main()
