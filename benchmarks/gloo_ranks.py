"""Runs a function in fresh processes that form a gloo group, one thread each."""

import multiprocessing
import os
import socket
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch


def on_gloo_ranks(ranks: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 300) -> list[Any]:
    """``function(*arguments)`` on each rank.

    Args:
        ranks: number of processes.
        function: of a module's top level; what it returns must pickle.
        arguments: must pickle.
        timeout_s: seconds until the processes are ended.

    Returns:
        What the ranks returned, in no order.

    Raises:
        RuntimeError: a rank failed or did not end in time.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_rank, args=(rank, ranks, port, results, function, arguments)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    until = time.monotonic() + timeout_s
    try:
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
    codes = [process.exitcode for process in processes]
    if codes != [0] * ranks:
        raise RuntimeError(f"processes ended with {codes}")
    return [results.get() for _ in range(ranks)]


def _rank(
    rank: int, ranks: int, port: int, results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import logging

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("torchrec", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    from embeddings.process_group import leave, process_group

    with process_group(torch.device("cpu")):
        results.put(function(*arguments))
    leave(0)
