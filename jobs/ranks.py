"""What a process of `dare train`, `dare evaluate` or `dare score` does around its work, alone or as one of several.

It chooses its device, joins the others, tells a failure once, and ends in order.
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
"""Seconds for which the failing rank that keeps the store waits for others that fail for the same reason."""


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
            # Here, within the block: the group cannot be taken down in order while others are in the middle of a
            # collective.
            leave(tell(error) if _fails_first() else exit_code(error))
    leave(0)


def _device() -> torch.device:
    if not torch.cuda.is_available() or not fbgemm_has_cuda():
        return torch.device("cpu")
    # torchrun numbers the processes of a node; without a launcher the first GPU is taken.
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _fails_first() -> bool:
    """Whether no other rank has failed before this one; also true if the store of the group is gone with its rank."""
    with suppress(Exception):
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=LINGER_S))
        # The store counts, so exactly one rank finds 0 before it.
        failed_before = store.add("failed_ranks", 1) - 1
        # The store lives in the first rank's process, which must not end before the others have used it.
        until = monotonic() + LINGER_S
        while dist.get_rank() == 0 and store.add("failed_ranks", 0) < dist.get_world_size() and monotonic() < until:
            sleep(0.05)
        return failed_before == 0
    return True


def _quieten() -> None:
    """Silence what libraries say of their own insides, which a user of `dare` can do nothing about."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("torchrec", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)


# Numbers of parameters in glibc's <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_large_blocks() -> None:
    """Keep the memory of large tensors on a CPU for the next ones; the process holds the most that it ever had.

    glibc takes blocks of 32 MiB and more from the kernel one by one and gives each back when it is freed, so that every
    large tensor of every step is made of new pages, which the kernel has to clear first. With many behaviours a batch
    that may take as long as computing: SIM (soft) with 64 floats a feature trained 1.6 times as fast without. Does
    nothing where the C library has no `mallopt`.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
