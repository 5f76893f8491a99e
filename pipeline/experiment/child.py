"""A command in a process of its own that ends when this one does, whatever ends it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.errors import FAULT_LINE

DIE_WITH_PARENT = """
import ctypes, os, signal, sys
parent, *command = sys.argv[1:]
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of <linux/prctl.h>
if os.getppid() != int(parent):  # it has died before we asked
    sys.exit(1)
os.execvp(command[0], command)
"""
"""Program of a process that asks the kernel to be killed when its parent dies, and becomes the command that follows.

The request outlives `exec`. It could be made in `preexec_fn` of `subprocess.Popen`, but that runs Python between fork
and exec, where a lock of another thread may be held for ever; a runner has threads.
"""


class Child:
    """A running command, whose output is appended to a file; it starts at once.

    To be made in the main thread: the kernel counts the end of the thread that starts a process as its parent's death.

    Args:
        command: program and arguments.
        environment: beside this process's.
        log: file for standard output and standard error.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        # With -I and -S Python reads neither its environment nor the installed packages, and starts in milliseconds.
        first = [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid())]
        with log.open("ab") as output:
            # The log goes on from earlier starts; only what comes after this is of this one.
            self._offset = output.tell()
            self._process = subprocess.Popen(
                [*first, *command],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the parent, which then asks its children to stop.
            )
        self._began = time.monotonic()
        self.began = time.time()
        """When, in seconds since 1970."""
        self.seconds = 0.0
        """From start to end."""
        self.peak_bytes = 0
        """Most resident memory, known at the end; at least the runner's own, which Linux counts when it forks."""
        self.code: int | None = None
        """Exit code; negative: the signal that ended it."""

    def poll(self) -> int | None:
        """Exit code, or None while it runs."""
        if self.code is None:
            self.seconds = time.monotonic() - self._began
            # Not `Popen.poll`: it waits too, but throws away how much memory the process had.
            pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
            if pid:
                self.code = self._process.returncode = os.waitstatus_to_exitcode(status)
                self.peak_bytes = usage.ru_maxrss * 1024
        return self.code

    def wait(self, timeout_s: float) -> int | None:
        """Wait for the end, but no longer than so many seconds; exit code, or None if it still runs."""
        until = time.monotonic() + timeout_s
        while self.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        return self.code

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def said(self) -> str:
        """Its output so far."""
        with self.log.open("rb") as log:
            log.seek(self._offset)
            return log.read().decode(errors="replace")

    def complaint(self) -> str:
        """Why it failed, in one line: what the command says of its error, or else the last line of its output."""
        lines = [line.strip() for line in self.said().splitlines() if line.strip()]
        complaints = [line.removeprefix("dare: ") for line in lines if line.startswith("dare: ")]
        if complaints and complaints[-1] == FAULT_LINE:
            # Behind a fault of the program stands its trace, whose last line says what it was.
            complaints = [line for line in lines if not line.startswith("dare: ")]
        last = (complaints or lines or ["it said nothing"])[-1]
        if self.code is not None and self.code < 0:
            return f"ended by {signal.Signals(-self.code).name}; last line: {last}"
        return last


def stop_all(children: Sequence[Child], patience_s: float = 60) -> None:
    """Ask all to stop, which lets them save; those that do not in time are killed."""
    try:
        for child in children:
            child.send(signal.SIGTERM)
        until = time.monotonic() + patience_s
        for child in children:
            child.wait(until - time.monotonic())
    finally:
        for child in children:
            # Also when the wait itself was interrupted: nobody is left behind.
            child.send(signal.SIGKILL)
            child.wait(10)
