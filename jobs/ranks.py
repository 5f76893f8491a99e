"""Runs a command's work on all ranks: alone, or under `python -m torch.distributed.run`; tells a failure once.

Memory of large tensors on a CPU, kept for the next ones.

glibc takes blocks of 32 MiB and more from the kernel one by one and gives each back when it is freed, so that every
large tensor of every step is made of new pages, which the kernel has to clear first. With many behaviours a batch that
may take as long as computing: SIM (soft) with 64 floats a feature trained 1.6 times as fast without.
"""

import ctypes
import logging
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from time import monotonic, sleep
from typing import NoReturn

import torch
import torch.distributed as dist

from embeddings.distributed.process_group import leave, process_group
from pipeline.errors import exit_code, tell
from pipeline.versions import fbgemm_has_cuda

LINGER_S = 5.0
"""The failing rank that keeps the store waits so long for others that fail for the same reason."""


def on_all_ranks(work: Callable[[torch.device], object]) -> NoReturn:
    """Do ``work`` in a process group and end the process: with 0, or as `pipeline.errors` says.

    Where several ranks fail, the first one tells why and the others keep quiet: mostly they have only lost contact.

    Args:
        work: gets this rank's device.
    """
    _quieten()
    device = _device()
    if device.type == "cpu":
        keep_large_blocks()
    with process_group(device):
        try:
            work(device)
        except BaseException as error:
            leave(tell(error) if _fails_first() else exit_code(error))
    leave(0)


def _device() -> torch.device:
    if not torch.cuda.is_available() or not fbgemm_has_cuda():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _fails_first() -> bool:
    """Also if nobody can be asked: the rank that kept the store is gone."""
    with suppress(Exception):
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=LINGER_S))
        place = store.add("failed_ranks", 1)
        until = monotonic() + LINGER_S
        while dist.get_rank() == 0 and store.add("failed_ranks", 0) < dist.get_world_size() and monotonic() < until:
            sleep(0.05)
        return place == 1
    return True


def _quieten() -> None:
    """What libraries say of their own insides is not for the users of `dare`."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("torchrec", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)


# <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_large_blocks() -> None:
    """Take large blocks from the heap and keep it; the process holds the most memory that it ever had.

    Does nothing where the C library has no `mallopt`.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
