"""The host's time to send columns to many ranks, in one process: what it sends goes nowhere.

S = ranks.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from statistics import median

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store, Work

from embeddings.distributed.collectives import Column, ColumnsAllToAll

NOWHERE = "nowhere"

KINDS = ((torch.int32, 3), (torch.float32, 16), (torch.float32, 32), (torch.int32, 1), (torch.float16, 16))
"""Types of the columns, in turn, and how many values a row has: records of words, rows, counts."""


@dataclass(frozen=True)
class PackingFigures:
    """Time of one exchange of columns, a median."""

    ranks: int
    columns: int
    values: int
    """Rows of a column."""
    ms: float
    """Of the host's CPU, from the columns to all of them having been received."""


class _Done(Work):
    """What a collective returns that was over at once."""

    def wait(self, timeout: timedelta = timedelta()) -> bool:
        return True


class _Nowhere(dist.ProcessGroup):
    """The first of many ranks, of which the others are not there: all-to-alls do nothing."""

    def getBackendName(self) -> str:
        return NOWHERE

    def alltoall_base(self, *_: object) -> Work:
        return _Done()


def _nowhere(store: Store, rank: int, size: int, timeout: timedelta) -> _Nowhere:
    # Classes of Python that take the place of a group are made without a store, of which torch's stubs do not know.
    return _Nowhere(rank, size)  # type: ignore[call-arg]


@contextmanager
def group_of_none(ranks: int) -> Iterator[dist.ProcessGroup]:
    """A group in which this process is the first of ``ranks``, and what it sends goes nowhere."""
    # Torch's own fake group copies what a rank sends, rank by rank, which takes far longer than what is measured here.
    if NOWHERE not in dist.Backend.backend_list:
        dist.Backend.register_backend(NOWHERE, _nowhere, devices=["cpu"])
    dist.init_process_group(NOWHERE, rank=0, world_size=ranks, store=HashStore())
    try:
        group = dist.group.WORLD
        assert isinstance(group, dist.ProcessGroup)
        yield group
    finally:
        dist.destroy_process_group()


def columns_of(ranks: int, columns: int, values: int) -> list[Column]:
    """Columns of ``values`` rows, of which each rank gets about as many, and sends about as many."""
    draw = torch.Generator().manual_seed(1)
    made = []
    for number in range(columns):
        dtype, width = KINDS[number % len(KINDS)]
        sent, received = (
            torch.bincount(torch.randint(0, ranks, (values,), generator=draw), minlength=ranks).tolist()
            for _ in range(2)
        )
        made.append(Column(torch.zeros(values, width, dtype=dtype), sent, received))
    return made


def measure(ranks: int, columns: int, values: int, rounds: int) -> PackingFigures:
    """Time an exchange."""
    times = []
    with group_of_none(ranks) as group:
        made = columns_of(ranks, columns, values)
        for _ in range(rounds + 2):
            began = time.process_time()
            ColumnsAllToAll(group, made).wait()
            times.append(time.process_time() - began)
    # The first rounds touch memory for the first time.
    return PackingFigures(ranks, columns, values, round(median(times[2:]) * 1e3, 3))
