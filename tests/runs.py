"""Real training runs for tests: processes that can be killed, in a folder that can be compared.

They end as `dare train` does; what `Run` calls sabotage makes them slow, stop, or die at a known moment.
"""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from pipeline.runs.run_folder import read_step_log
from schemas.settings import load_settings
from schemas.train import TrainSettings
from tests.launcher import PATIENCE_S, start, start_ranks, wait

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
        self.folder = folder
        self._said = tempfile.TemporaryDirectory()  # not beside the run, whose disk may be full
        self._errors = [Path(self._said.name) / f"{rank}.err" for rank in range(ranks)]
        self.processes = start_ranks(ranks, _train, self._errors, settings, data, folder, sabotage, arguments)

    def wait(self) -> list[int | None]:
        """Exit codes; processes that do not end are killed."""
        return wait(self.processes)

    def finish(self) -> "Run":
        """Wait for an end without errors."""
        codes = self.wait()
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

    def wait_for_step(self, step: int) -> None:
        """Wait until the log of losses, which is flushed now and then, has reached ``step``."""
        until = time.monotonic() + PATIENCE_S
        while not (log := read_step_log(self.folder / "losses.jsonl")) or log[-1]["step"] < step:
            assert time.monotonic() < until, f"step {step} not reached: {self.said()}"
            assert any(process.is_alive() for process in self.processes), self.said()
            time.sleep(0.01)

    def wait_for_pause(self, folder: Path) -> None:
        """Wait until all ranks are where `pause` stops them."""
        until = time.monotonic() + PATIENCE_S
        while not all((folder / str(rank)).exists() for rank in range(len(self.processes))):
            assert time.monotonic() < until, self.said()
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


def _train(
    rank: int,
    errors: Sequence[Path],
    settings: TrainSettings,
    data: Path,
    folder: Path,
    sabotage: Callable[..., None] | None,
    arguments: tuple[Any, ...],
) -> None:
    from jobs.ranks import on_all_ranks
    from pipeline.progress import log_to_standard_error
    from pipeline.train.run import train

    sys.stderr = errors[rank].open("w", buffering=1)
    log_to_standard_error()
    if sabotage:
        sabotage(rank, *arguments)

    def work(device: torch.device) -> None:
        train(settings, data, folder, device)

    on_all_ranks(work)


def slow_steps(rank: int, stop_at: int | None = None) -> None:
    """Sabotage: steps take a tenth of a second more; after ``stop_at``, as if SIGTERM had come, one more is made."""
    from pipeline.train import trainer

    agree = trainer.agree

    def slowly(step: int, output: Any, gradient_norm: Any, stop: bool) -> Any:
        time.sleep(0.1)
        return agree(step, output, gradient_norm, stop or step == stop_at)

    trainer.agree = slowly


def pause(rank: int, step: int, folder: Path) -> None:
    """Sabotage: each rank waits in ``step``, where it writes ``folder/RANK``, until there is ``folder/go``."""
    from pipeline.train import trainer

    agree = trainer.agree

    def paused(now: int, *arguments: Any) -> Any:
        if now == step:
            (folder / str(rank)).touch()
            while not (folder / "go").exists():
                time.sleep(0.01)
        return agree(now, *arguments)

    trainer.agree = paused


def kill_in_the_middle_of_a_write(rank: int, of: int, at: int) -> None:
    """Sabotage: rank ``of`` dies when checkpoint number ``at`` is on disk but for its name."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    count = [0]
    write_data = FileSystemWriter.write_data

    def die(*arguments: Any, **named: Any) -> Any:
        count[0] += 1
        found = write_data(*arguments, **named)
        found.wait()
        if rank == of and count[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    FileSystemWriter.write_data = die


def run_dare(folder: Path, *arguments: object) -> tuple[int | None, str, str]:
    """`dare` in a process of its own, with files in ``folder``: exit code, standard output, standard error."""
    (code,) = wait([start_dare(folder, *arguments)])
    return code, (folder / "stdout").read_text(), (folder / "stderr").read_text()


def start_dare(folder: Path, *arguments: object) -> BaseProcess:
    """`dare` in a process of its own, which can be killed, with its output in ``folder``."""
    return start(_dare, [str(argument) for argument in arguments], folder / "stdout", folder / "stderr")


def _dare(arguments: list[str], output: Path, errors: Path) -> None:
    from jobs.cli import main

    sys.argv = ["dare", *arguments]
    sys.stdout, sys.stderr = output.open("w", buffering=1), errors.open("w", buffering=1)
    main()
