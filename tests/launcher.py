"""Starts the processes of tests: the ranks of a group on this host, or a single command.

They are forked from a server that has imported what they need (tests/preloaded.py), so that starting them is cheap.
Whatever waits for them waits up to `PATIENCE_S`: how long something takes on a loaded machine says nothing about
whether it works.
"""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from embeddings.distributed.process_group import leave, process_group, rank_environment

ROOT = Path(__file__).parents[1]
PATIENCE_S = 600.0
"""Seconds until what does not end is taken to hang."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process of its own, with one thread, that calls ``function(*arguments)``; both must pickle."""
    return _started(_alone, (function, arguments))


def start_ranks(ranks: int, function: Callable[..., None], *arguments: Any) -> list[BaseProcess]:
    """Processes that know of each other as torchrun's do, and call ``function(rank, *arguments)``."""
    port = free_port()
    return [_started(_as_rank, (rank, ranks, port, function, arguments)) for rank in range(ranks)]


def wait(processes: Sequence[BaseProcess], timeout: float = PATIENCE_S) -> list[int | None]:
    """Exit codes once all have ended; those that do not end are killed, and have none."""
    until = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def run_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(*arguments)`` on each rank, inside a process group of ``ranks``.

    Args:
        ranks: number of processes.
        function: a function of a module's top level; what it returns must pickle.
        arguments: must pickle.

    Returns:
        What each rank returned.

    Raises:
        AssertionError: a rank raised, did not finish in time, or ended with another exit code than 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        codes = wait(start_ranks(ranks, _in_group, folder, function, arguments))
        outcomes = [_outcome(Path(folder) / str(rank)) for rank in range(ranks)]
    errors = [error for _, error in outcomes if error]
    assert not errors, errors[0]
    assert codes == [0] * ranks, f"exit codes {codes}"
    return [result for result, _ in outcomes]


def _started(target: Callable[..., None], arguments: tuple[Any, ...]) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    with contextlib.chdir(ROOT):  # where the server finds what it loads, wherever this test has gone
        multiprocessing.forkserver.ensure_running()
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def _alone(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # What the tests themselves were started with, such as `nohup`, is not what is tested.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    function(*arguments)


def _as_rank(rank: int, ranks: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= rank_environment(rank, ranks, port)
    _alone(function, (rank, *arguments))


def _in_group(rank: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    result, error = None, ""
    try:
        with process_group(torch.device("cpu")):
            result = function(*arguments)
    except BaseException:
        error = traceback.format_exc()
    (Path(folder) / str(rank)).write_bytes(pickle.dumps((result, error)))
    leave(1 if error else 0)


def _outcome(path: Path) -> tuple[Any, str]:
    return pickle.loads(path.read_bytes()) if path.is_file() else (None, "")
