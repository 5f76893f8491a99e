"""Run a function in several real processes that form a gloo group.

Processes are forked from a server that has imported torch, TorchRec and the model, so that starting them is cheap.
"""

import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from embeddings.distributed.process_group import leave, process_group

PRELOADED = [
    "torch",
    "torchrec",
    "embeddings.models",
    "embeddings.sharding",
    "pipeline.train.run",
    "pipeline.train.reporting",
    "torch._dynamo",
    "numba",
    "jobs.ranks",
    "tests.launcher",
]


def run_ranks(ranks: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """``function(*arguments)`` on each rank, inside a process group of ``ranks``.

    Args:
        ranks: number of processes.
        function: a function of a module's top level; what it returns must pickle.
        arguments: must pickle.
        timeout: seconds until the processes are killed.

    Returns:
        What each rank returned.

    Raises:
        AssertionError: a rank raised, did not finish in time, or ended with another exit code than 0.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        processes = [
            context.Process(target=_rank, args=(rank, ranks, port, folder, function, arguments))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(timeout)
        finally:
            for process in processes:
                process.kill()
        outcomes = [_outcome(Path(folder) / str(rank)) for rank in range(ranks)]
    errors = [error for _, error in outcomes if error]
    codes = [process.exitcode for process in processes]
    assert not errors, errors[0]
    assert codes == [0] * ranks, f"exit codes {codes}"
    return [result for result, _ in outcomes]


def _rank(
    rank: int, ranks: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
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
