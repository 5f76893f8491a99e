"""`dare serve` in a process of its own, which can be killed and started again at the same address."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import requests

import benchmarks
from schemas.errors import UserError

PATIENCE_S = 120.0
"""Time to start, and to end."""
THREADS = len(os.sched_getaffinity(0))
QUEUE = 64


def session() -> requests.Session:
    """A connection on which no proxies nor passwords are looked up for each request."""
    made = requests.Session()
    made.trust_env = False
    return made


class ServedProcess:
    """A server on loopback, as long as the block lasts."""

    def __init__(self, folder: Path, root: Path, threads: int = THREADS, queue: int = QUEUE) -> None:
        """Know what to start.

        Args:
            folder: exported model that answers at first.
            root: folder below which others lie.
            threads: requests that it works on at once.
            queue: requests that may wait.
        """
        self.threads, self.queue, self.url = threads, queue, ""
        self._folder, self._root = folder.resolve(), root.resolve()
        self._port = 0
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile("w+")
        try:
            self.start()
        except BaseException:
            self.kill()
            self._log.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self.kill()
        self._log.close()

    def start(self) -> None:
        """Start it, and wait until it answers.

        Raises:
            UserError: it ends, or does not answer in time.
        """
        command = [sys.executable, "-m", "jobs.cli", "serve", str(self._folder), "--models", str(self._root)]
        command += ["--port", str(self._port), "--threads", str(self.threads), "--queue", str(self.queue)]
        # The program that measures is the one that is measured.
        places = [str(Path(benchmarks.__path__[0]).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        if not said.startswith("listening on "):
            raise UserError(f"the server does not start: {self._complaint()}")
        self.url = said.removeprefix("listening on ").strip()
        self._port = int(self.url.rpartition(":")[2])
        until = time.monotonic() + PATIENCE_S
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > until:
                raise UserError(f"the server does not get ready: {self._complaint()}")
            time.sleep(0.02)

    def _ready(self) -> bool:
        with session() as client:
            try:
                return bool(client.get(f"{self.url}/health", timeout=PATIENCE_S).ok)
            except requests.RequestException:
                return False

    def _complaint(self) -> str:
        self._log.seek(0)
        return (self._log.read().strip().splitlines() or ["it says nothing"])[-1]

    def kill(self) -> None:
        """End it as a power cut does (SIGKILL), and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def reload(self, folder: Path) -> str | None:
        """Let another model below the root answer; what it says where it refuses."""
        path = str(folder.resolve().relative_to(self._root))
        with session() as client:
            try:
                answer = client.post(f"{self.url}/reload", json={"path": path}, timeout=PATIENCE_S)
            except requests.RequestException as error:
                return type(error).__name__
            return None if answer.ok else f"status {answer.status_code}"

    def memory_kib(self) -> tuple[int, int]:
        """Its resident memory, and the part of it that is no file."""
        assert self._process is not None
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        found = {name: int(value.split()[0]) for name, value in (line.split(":", 1) for line in lines if "kB" in line)}
        return found["VmRSS"], found["RssAnon"]

    def cpu_s(self) -> float:
        """Time for which processors have worked for it."""
        assert self._process is not None
        # Its name, in parentheses, may have blanks.
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
