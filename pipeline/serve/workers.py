"""Threads that work on requests, so that the event loop stays free to accept, refuse and report."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

T = TypeVar("T")


class BusyError(Exception):
    """All threads work and the queue is full."""


class LateError(Exception):
    """A piece of work was not done in its time."""


class Workers:
    """A fixed number of threads with a queue that has an end."""

    def __init__(self, threads: int, queue: int) -> None:
        """Start with no work.

        Args:
            threads: that work at the same time.
            queue: pieces of work that may wait.
        """
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="answer")
        self._room = threads + queue
        self._taken = 0
        self._begun: set[Future[Any]] = set()

    async def run(self, work: Callable[[], T], seconds: float) -> T:
        """Do a piece of work on a thread and wait for it; to be called on one event loop alone.

        Args:
            work: what is done; an exception of its own comes out of this call.
            seconds: how long to wait.

        Raises:
            BusyError: there is no room.
            LateError: it took longer. What has not begun never begins; what has begun keeps its thread to its end.
        """
        if self._taken >= self._room:
            raise BusyError
        self._taken += 1
        loop = asyncio.get_running_loop()
        future = self._pool.submit(work)
        self._begun.add(future)
        # Room is given back when the thread is free, not when its sender is answered: late work is work.
        future.add_done_callback(lambda done: self._give_back(loop, done))
        waiting = asyncio.wrap_future(future)
        done, _ = await asyncio.wait({waiting}, timeout=seconds)
        if not done:
            # Nobody asks how late work ends.
            waiting.add_done_callback(lambda late: late.cancelled() or late.exception())
            future.cancel()
            raise LateError
        return waiting.result()

    def _give_back(self, loop: asyncio.AbstractEventLoop, done: Future[T]) -> None:
        def given() -> None:
            self._taken -= 1

        self._begun.discard(done)

        # Late work may end after the loop has.
        if not loop.is_closed():
            loop.call_soon_threadsafe(given)

    def close(self, seconds: float) -> bool:
        """Begin no further work, and give what has begun some seconds to end.

        Returns:
            Whether it has: no thread works any more.
        """
        self._pool.shutdown(wait=False, cancel_futures=True)
        return not wait(list(self._begun), seconds).not_done
