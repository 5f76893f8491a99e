"""`dare serve` in a process of its own, with what tests ask of it."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests

from tests.launcher import PATIENCE_S, start, wait
from tests.served import Exported


def count(exported: Exported) -> int:
    """Number of events of its history."""
    return max(len(values) for values in exported.history.values() if isinstance(values, list))


class Server:
    """A server that has been started on a free port of this machine; it ends with the block."""

    def __init__(
        self,
        folder: Path,
        *arguments: object,
        sabotage: Callable[..., None] | None = None,
        given: tuple[Any, ...] = (),
    ) -> None:
        """Start it; ``sabotage(*given)`` is called in its process before it begins. Its output is in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        self._output, self._errors = folder / "stdout", folder / "stderr"
        command = ["serve", *map(str, arguments)]
        if "--port" not in command:
            command += ["--port", "0"]
        self.process = start(_serve, command, self._output, self._errors, sabotage, given)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.join()

    def address(self) -> str:
        """Its URL, once it listens."""
        self.until(lambda: self._output.exists() and self._output.read_text().endswith("\n"))
        return self._output.read_text().splitlines()[-1].removeprefix("listening on ")

    def place(self) -> tuple[str, int]:
        """Host and port, for what is no HTTP."""
        host, _, port = self.address().removeprefix("http://").partition(":")
        return host, int(port)

    def ready(self) -> Self:
        """Wait until its models answer."""
        self.until(lambda: self.get("/health").status_code == 200)
        return self

    def until(self, true: Callable[[], bool]) -> None:
        """Wait for something, as long as it runs."""
        end = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < end, self.said()
            assert self.process.is_alive(), self.said()
            time.sleep(0.01)

    def wait_for(self, line: str) -> None:
        """Wait until it has said something on standard error."""
        self.until(lambda: line in self.said())

    def get(self, path: str) -> requests.Response:
        return requests.get(self.address() + path, timeout=PATIENCE_S)

    def post(self, path: str, body: object = None, **given: Any) -> requests.Response:
        """Send a body as JSON, or ``data`` as it is."""
        given.setdefault("data", json.dumps(body))
        given.setdefault("headers", {"Content-Type": "application/json"})
        return requests.post(self.address() + path, timeout=PATIENCE_S, **given)

    def metric(self, name: str) -> float:
        """Value of a sample of its metrics, by name and labels as they stand in the text; 0 if there is none."""
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == name)

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.terminate()

    def interrupt(self) -> None:
        """Ctrl-C."""
        assert self.process.pid
        os.kill(self.process.pid, signal.SIGINT)

    def ended(self) -> int | None:
        """Exit code, once it has ended."""
        return wait([self.process])[0]

    def printed(self) -> str:
        """Standard output."""
        return self._output.read_text() if self._output.exists() else ""

    def said(self) -> str:
        """Standard error."""
        return self._errors.read_text() if self._errors.exists() else ""


def _serve(
    command: Sequence[str],
    output: Path,
    errors: Path,
    sabotage: Callable[..., None] | None,
    given: tuple[Any, ...],
) -> None:
    from jobs.cli import main

    sys.argv = ["dare", *command]
    sys.stdout, sys.stderr = output.open("w", buffering=1), errors.open("w", buffering=1)
    if sabotage:
        sabotage(*given)
    main()


def hold(folder: Path) -> None:
    """Sabotage: who scores writes ``folder/N``, N = 0, 1, ..., and waits until there is ``folder/go``."""
    from itertools import count

    from pipeline.serve.predictor import Predictor

    answer, number = Predictor.answer, count()

    def held(self: Predictor, *arguments: Any) -> Any:
        (folder / str(next(number))).touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
        return answer(self, *arguments)

    Predictor.answer = held


def hold_warming(folder: Path) -> None:
    """Sabotage: a model that is loaded waits before its first answer until there is ``folder/go``."""
    from pipeline.serve.predictor import Predictor

    warm = Predictor.warm

    def held(self: Predictor) -> None:
        (folder / "warming").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
        warm(self)

    Predictor.warm = held  # type: ignore[method-assign]


def load_in_torch(folder: Path) -> None:
    """Sabotage: a model after the first one is long in C++ when it is loaded, and writes ``folder/loading`` before."""
    from itertools import count

    import torch

    from pipeline.serve.predictor import Predictor

    warm, number = Predictor.warm, count()

    def slow(self: Predictor) -> None:
        if next(number):
            (folder / "loading").touch()
            torch.rand(1 << 24).sort()
        warm(self)

    Predictor.warm = slow  # type: ignore[method-assign]


def break_down() -> None:
    """Sabotage: scoring has a fault."""
    from pipeline.serve.predictor import Predictor

    def broken(self: Predictor, *arguments: Any) -> Any:
        raise ZeroDivisionError("a secret of the server")

    Predictor.answer = broken
