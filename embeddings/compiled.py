"""Compiled loops on a CPU: the compiler, whose code is kept on disk, and threads, which are kept between calls.

P = cuts between parts of the work.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(fastmath: bool | set[str] = False) -> Callable[[Function], Function]:
    """A decorator that compiles a function and keeps the code on disk where there is a place to write to.

    Args:
        fastmath: which of LLVM's liberties with floating-point numbers the compiler may take.
    """
    # The compiler takes a second to load: only modules that hold compiled code pay for it.
    from numba import njit

    def decorate(function: Function) -> Function:
        try:
            cached: Function = njit(nogil=True, cache=True, fastmath=fastmath)(function)
            return cached
        except RuntimeError:  # Numba refuses to cache in a read-only installation without a home directory.
            fresh: Function = njit(nogil=True, fastmath=fastmath)(function)
            return fresh

    return decorate


def in_threads(work: Callable[[int, int], object], cut_P: Sequence[int], threads: int) -> None:
    """Do ``work(begin, end)`` for each two neighbouring cuts, on ``threads`` threads; it must let go of the GIL.

    Raises:
        Exception: what a part of the work has raised.
    """
    if threads == 1 or len(cut_P) <= 2:
        for begin, end in pairwise(cut_P):
            work(begin, end)
        return
    # `list` waits, and raises what a thread has raised.
    list(_pool(os.getpid(), threads).map(work, cut_P[:-1], cut_P[1:]))


@lru_cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process; ``process`` is its id, because a forked child lacks the threads of its parent."""
    return ThreadPoolExecutor(threads, thread_name_prefix="dare")
