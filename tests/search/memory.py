"""The most memory that a call has at once beyond what was there before: of tensors, and of numpy's arrays."""

import tracemalloc
from collections.abc import Callable

from torch.autograd.profiler import profile


def peak_of_tensors(call: Callable[[], object]) -> int:
    """Bytes of tensors at the worst moment, those within operators included; a CPU's allocator notes each one."""
    with profile(profile_memory=True) as noted:
        call()
    assert noted.kineto_results is not None
    changes = [
        (event.start_ns(), event.nbytes()) for event in noted.kineto_results.events() if event.name() == "[memory]"
    ]
    live = most = 0
    for _, change in sorted(changes, key=lambda of: of[0]):
        live += change
        most = max(most, live)
    return most


def peak_of_arrays(call: Callable[[], object]) -> int:
    """Bytes of numpy's arrays, and of all other objects of Python, at the worst moment."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
