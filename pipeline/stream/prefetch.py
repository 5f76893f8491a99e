"""A thread that makes items ahead of their consumer, up to a bound."""

import queue
import threading
import time
import weakref
from collections.abc import Generator
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")


class _Failure:
    """An exception of the generator, on its way to the consumer."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


_END = object()
"""Comes after the last item."""


class Prefetch(Generic[T]):
    """Iterates over ``items``, which run in a thread of their own; what they raise is raised here, in its turn.

    The thread ends with the items, with ``close``, or when this object is forgotten, and closes the generator before.

    Args:
        items: a generator.
        ahead: items that may wait for the consumer.
    """

    def __init__(self, items: Generator[T, None, None], ahead: int) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(ahead)
        # The thread runs a function that knows the queue and the event alone. One that knew this object would keep it
        # alive, and it would never be forgotten.
        stop = threading.Event()
        thread = threading.Thread(target=_produce, args=(items, self._queue, stop), name="prefetch", daemon=True)
        # Also runs when the interpreter exits, while threads still can be waited for.
        self._finish = weakref.finalize(self, _stop, self._queue, stop, thread)
        self.waited_s = 0.0
        """Seconds that the consumer has waited for items."""
        thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        # Closed: the queue is empty, and nobody fills it.
        if not self._finish.alive:
            raise StopIteration
        began = time.perf_counter()
        item = self._queue.get()
        self.waited_s += time.perf_counter() - began
        if item is _END or isinstance(item, _Failure):
            self.close()
            raise item.error if isinstance(item, _Failure) else StopIteration
        made: T = item
        return made

    def close(self) -> None:
        """End the thread; nothing more comes."""
        self._finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _produce(items: Generator[T, None, None], ready: queue.Queue[Any], stop: threading.Event) -> None:
    # Once `stop` is set, at most one more item is put, and `_stop` has made room for it: this thread cannot block.
    last: object = _END
    try:
        for item in items:
            if stop.is_set():
                break
            ready.put(item)
            if stop.is_set():
                break
    except BaseException as error:
        last = _Failure(error)
    finally:
        items.close()
    if not stop.is_set():
        ready.put(last)


def _stop(ready: queue.Queue[Any], stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    while True:
        try:
            ready.get_nowait()
        except queue.Empty:
            break
    if thread is not threading.current_thread():  # the garbage collector runs in any thread
        thread.join()
