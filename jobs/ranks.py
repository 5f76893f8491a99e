"""What a process of `dare train`, `dare evaluate` or `dare score` does around its work, alone or as one of several.

It meets the others, chooses its device, tells a failure once, and ends in order.
"""

import ctypes
import logging
import resource
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import timedelta
from time import monotonic, sleep
from typing import NoReturn

import torch

from embeddings.distributed.process_group import Meeting, leave, process_group
from jobs.device import own_device
from pipeline.errors import exit_code, tell

LINGER_S = 5.0
"""Seconds for which the failing rank that keeps the store waits for others that fail for the same reason."""


def on_all_ranks(work: Callable[[torch.device], object]) -> NoReturn:
    """Do ``work`` in a process group and end the process: with 0, or as `pipeline.errors` says.

    Where several ranks fail, the first one tells why and the others keep quiet: mostly they have only lost contact.

    Args:
        work: gets this rank's device.
    """
    _quieten()
    allow_many_files()
    # Before the device: a rank that has none can still tell the others, which would wait for it in NCCL.
    meeting = Meeting.join()
    with ExitStack() as stack:
        try:
            device = own_device()
            if device.type == "cpu":
                keep_large_blocks()
            stack.enter_context(process_group(device, meeting))
            work(device)
        except BaseException as error:
            # Here, within the block: the group cannot be taken down in order while others are in the middle of a
            # collective.
            leave(tell(error) if _fails_first(meeting) else exit_code(error))
    leave(0)


def _fails_first(meeting: Meeting) -> bool:
    """Whether no other rank has failed before this one; also true if the store is gone with its rank."""
    with suppress(Exception):
        meeting.store.set_timeout(timedelta(seconds=LINGER_S))
        first = meeting.fail()
        # The store lives in the first rank's process, which must not end before the others have used it.
        until = monotonic() + LINGER_S
        while meeting.rank == 0 and meeting.failed < meeting.ranks and monotonic() < until:
            sleep(0.05)
        return first
    return True


def _quieten() -> None:
    """Silence what libraries say of their own insides, which a user of `dare` can do nothing about."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("torchrec", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)


def allow_many_files() -> None:
    """Raise this process's limit of open files to the highest that the system grants.

    The first rank's process keeps the store, with two connections of each rank: one of training, one of what writes
    checkpoints. The usual 1,024 end at 500 ranks.
    """
    highest = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest, highest))


# Numbers of parameters in glibc's <malloc.h>.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_large_blocks() -> None:
    """Keep the memory of large tensors on a CPU for the next ones; the process holds the most that it ever had.

    glibc takes blocks of 32 MiB and more from the kernel one by one and gives each back when it is freed, so that every
    large tensor of every step is made of new pages, which the kernel has to clear first. With many behaviours a batch
    that may take as long as computing: SIM (soft) with 64 floats a feature trained 1.6 times as fast without. Does
    nothing where the C library has no `mallopt`.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
