"""The process group of a run: made from the launcher's environment, or of one rank, and left in order."""

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from schemas.errors import UserError

TIMEOUT = timedelta(minutes=10)
"""A collective that waits longer for another rank is an error."""


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return the environment by which `process_group` joins the other ranks, all on this machine, as torchrun sets it.

    Args:
        rank: number of the rank, from 0.
        ranks: how many there are.
        port: port of this machine that is free.
    """
    here = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
    return {key: str(value) for key, value in here.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@contextmanager
def process_group(device: torch.device) -> Iterator[dist.ProcessGroup]:
    """The default process group: gloo on a CPU, NCCL on CUDA.

    Under torchrun (``RANK``, ``WORLD_SIZE`` and the like are set) it joins the others; else it is a group of one rank,
    which opens no port. A program that has used it ends by `leave`.

    Raises:
        UserError: ``WORLD_SIZE`` is set, but another variable of a launcher is missing or wrong.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        try:
            dist.init_process_group(backend, timeout=TIMEOUT)
        except ValueError as error:  # a variable that is missing, or not a number
            raise UserError(f"WORLD_SIZE is set, as by a launcher of ranks, but {error}; use torchrun") from None
    else:
        # The store is memory of this process; the default one, a TCPStore, would listen on a port.
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    group = dist.group.WORLD
    assert group is not None
    try:
        yield group
    finally:
        # Reference cycles may still hold modules and works of this group; they are to go before the group does.
        gc.collect()
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End the process with this exit code: exit functions run, streams are flushed, the interpreter is not shut down.

    A gloo thread may drop the last reference to a finished collective's tensor. If that falls into the interpreter's
    shutdown, the thread is ended in the middle of it and the process aborts ("terminate called without an active
    exception", SIGABRT) after all its work is done; a launcher then sees a failed job. So a program that has used
    `process_group` ends by this function.
    """
    # `os._exit` skips all of this, so it is done by hand: temporary files are removed, and the last lines are not lost.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
