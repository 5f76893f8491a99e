"""Ends a rank whose launcher has died: nobody would tell it to stop, or end the ranks that it waits for.

It looks at process ids in a thread, from before the slow imports on: a request to the kernel (PR_SET_PDEATHSIG) would
come too late for a launcher that dies meanwhile, and would not see torchx behind torchrun. The parent is the same kind
of process under Slurm, in a container and on a laptop.
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

LOOK_EVERY_S = 1.0
REAPERS = ("systemd", "init", "tini", "dumb-init", "docker-init", "catatonit", "slurmstepd", "conmon")
"""Programs that become the parent of a process whose own has died."""


def watch_launcher() -> None:
    """Watch the launcher of this process, if it has one: torchrun, or torchx on this machine.

    If it dies, the process gets a SIGTERM, with which training saves and ends; a process that has only begun ends at
    once. A torchrun that torchx has started gets one if torchx dies, and passes it on.
    """
    launched, by_torchx = "TORCHELASTIC_RUN_ID" in os.environ, _is_local_torchx()
    if not launched and not by_torchx:
        return
    chain = [os.getppid()]
    if launched and by_torchx:
        chain.append(_parent_of(chain[0]))
    # Each process is told to end when the one behind it in the chain goes: this one, torchrun.
    told = [os.getpid(), *chain]
    for child, parent in zip(told, chain, strict=False):
        if _is_reaper(parent):
            _end(child)
    threading.Thread(target=_watch, args=(list(zip(told, chain, strict=False)),), name="launcher", daemon=True).start()


def _watch(links: list[tuple[int, int]]) -> None:
    while links:
        time.sleep(LOOK_EVERY_S)
        for child, parent in links:
            if _parent_of(child) != parent:
                _end(child)
                return


def _end(child: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGTERM)


def _is_local_torchx() -> bool:
    return os.environ.get("TORCHX_JOB_ID", "").startswith("local_cwd://")


def _parent_of(process: int) -> int:
    """Id of a process's parent; 0: it is gone."""
    if process == os.getpid():
        return os.getppid()
    try:
        # "pid (name) state parent ...", where the name may have spaces and brackets.
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _is_reaper(process: int) -> bool:
    """Whether a parent is not a launcher but what takes its place. A launcher is a Python program, and may be 1."""
    try:
        program = Path(os.readlink(f"/proc/{process}/exe")).name
    except OSError:
        program = ""  # of another user, such as root's first process; or there is no /proc
    if program.startswith("python") or program == Path(sys.executable).resolve().name:
        return False
    return process <= 1 or program in REAPERS
