"""What a process of `dare train`, `dare evaluate` or `dare score` does around its work, alone or as one of several.

It meets the others, chooses its device, tells a failure once, and ends in order.
"""

import ctypes
import logging
import resource
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import timedelta
from time import monotonic, sleep
from typing import NoReturn

import torch

from embeddings.distributed.process_group import Meeting, leave, process_group, seconds_of
from embeddings.distributed.rank_watch import HANG_S, HANG_SECONDS, RankWatch
from jobs.device import own_device
from pipeline.errors import LAST_WORDS, exit_code, flush_output, is_refusal, tell
from schemas.errors import UserError

LINGER_S = 5.0
"""Seconds for which the failing rank that keeps the store waits for others that fail for the same reason."""


_TELLING = threading.Lock()
"""Held by the thread that ends the process: its line is the only one."""


def on_all_ranks(work: Callable[[torch.device], int | None]) -> NoReturn:
    """Do ``work`` in a process group and end the process: with what it returns, or as `pipeline.errors` says.

    Where several ranks fail, the first one tells why and the others keep quiet: mostly they have only lost contact. But
    where a rank does not answer, or not all have come, each tells so: nobody can speak for all.

    Args:
        work: gets this rank's device and returns the exit code; None: 0.
    """
    _quieten()
    allow_many_files()
    try:
        limit_s = seconds_of(HANG_SECONDS, HANG_S)
        # Before the device: a rank that has none can still tell the others, which would wait for it in NCCL.
        meeting = Meeting.join()
    except (UserError, KeyboardInterrupt) as error:
        leave(tell(error))
    watch = RankWatch(meeting.store, meeting.rank, meeting.ranks, limit_s, _end_without_main_thread)
    with ExitStack() as stack:
        try:
            device = own_device()
            if device.type == "cpu":
                keep_large_blocks()
            stack.enter_context(process_group(device, meeting))
            code = work(device) or 0
            flush_output()
            # Before the group is left: the others may take a while longer.
            watch.leave()
        except BaseException as error:
            # Here, within the block: the group cannot be taken down in order while others are in the middle of a
            # collective.
            with _TELLING:
                code = tell(error) if _fails_first(meeting) else exit_code(error)
                watch.leave()
                leave(code)
    leave(code)


def _end_without_main_thread(line: str) -> NoReturn:
    """End the process from another thread: the main one waits for a rank that will not come."""
    with _TELLING:
        print(f"dare: {line}", file=sys.stderr, flush=True)
        for note in LAST_WORDS:
            note(line)
        leave(1)


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
    former = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        # TensorBoard's thread prints a trace of a full disk, besides handing the error on to whoever writes next.
        if not (failed.exc_value and is_refusal(failed.exc_value)):
            former(failed)

    threading.excepthook = hook


def allow_many_files() -> None:
    """Raise this process's limit of open files to the highest that the system grants.

    The first rank's process keeps the store, with three connections of each rank: one of training, one of what watches
    the ranks, one of what writes checkpoints. The usual 1,024 end at 340 ranks.
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
