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
    # Whoever is free takes the next part. This thread takes part too: with only others at work it would have to be
    # woken up at the end, and they would share the cores with it until it sleeps.
    parts = iter(list(pairwise(cut_P)))

    def take() -> None:
        for begin, end in parts:
            work(begin, end)

    others = [_pool(os.getpid(), threads).submit(take) for _ in range(min(threads, len(cut_P) - 1) - 1)]
    take()
    for other in others:
        other.result()


def in_even_parts(work: Callable[[int, int], object], size: int, threads: int) -> None:
    """Do ``work(begin, end)`` for parts of 0 .. ``size`` of equal length, one for each of ``threads`` threads."""
    in_threads(work, [size * number // threads for number in range(threads + 1)], threads)


@lru_cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process; ``process`` is its id, because a forked child lacks the threads of its parent."""
    return ThreadPoolExecutor(threads, thread_name_prefix="dare")
