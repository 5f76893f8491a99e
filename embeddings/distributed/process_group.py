"""The process group of a run: the ranks meet, agree on a kind of device, form a group, and leave it in order."""

import atexit
import gc
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from schemas.errors import UserError

TIMEOUT = timedelta(minutes=10)
"""A collective that waits longer for another rank is an error."""


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return the environment by which `process_group` joins the other ranks, all on this machine, as torchrun sets it.

    Args:
        rank: number of the rank, from 0.
        ranks: how many there are.
        port: port of this machine that is free.
    """
    here = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
    return {key: str(value) for key, value in here.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@dataclass(frozen=True)
class Meeting:
    """The store in which the ranks have met; none of them has touched its device yet."""

    store: Store
    rank: int
    ranks: int

    @classmethod
    def join(cls) -> "Meeting":
        """Meet the other ranks of a launcher, which has set ``RANK``, ``WORLD_SIZE`` and the like; else be alone.

        Raises:
            UserError: ``WORLD_SIZE`` is set, but another variable of a launcher is missing or wrong.
        """
        if "WORLD_SIZE" not in os.environ:
            # Memory of this process; the store of several ranks, a TCPStore, would listen on a port.
            return cls(HashStore(), 0, 1)
        try:
            store, rank, ranks = next(rendezvous("env://", timeout=TIMEOUT))
        except ValueError as error:  # a variable that is missing, or not a number
            raise UserError(f"WORLD_SIZE is set, as by a launcher of ranks, but {error}; use torchrun") from None
        store.set_timeout(TIMEOUT)
        return cls(store, rank, ranks)

    def agree_on_device(self, kind: str) -> None:
        """Compare the kinds of device of all ranks, which all must call it.

        Ranks of several kinds would wait for each other in different libraries, gloo and NCCL, until both give up.

        Args:
            kind: ``cpu`` or ``cuda``, this rank's.

        Raises:
            UserError: on all ranks, where another rank has another kind than the first, or has failed before it came
                here.
        """
        self.store.set(f"device/{self.rank}", f"{kind} on {socket.gethostname()}")
        if self.rank == 0:
            # Only the first rank looks at all the others: with a thousand ranks, a thousand reads.
            found = [text.decode() for text in self.store.multi_get([f"device/{rank}" for rank in range(self.ranks)])]
            kinds = [text.partition(" ")[0] for text in found]
            other = next((rank for rank in range(self.ranks) if kinds[rank] != kinds[0]), None)
            self.store.set("device", "" if other is None else _difference(found[0], other, found[other]))
        if difference := self.store.get("device").decode():
            raise UserError(difference)

    def fail(self) -> bool:
        """Let the others know that this rank fails; return whether none has failed before it."""
        # The store counts, so exactly one rank is the first.
        first: bool = self.store.add("failed_ranks", 1) == 1
        # After that: those that wait to hear of this rank's device are released, and fail as later ones.
        self.store.set(f"device/{self.rank}", "nothing")
        if self.rank == 0:
            self.store.set("device", "the first rank has failed")
        return first

    @property
    def failed(self) -> int:
        """How many ranks have called `fail`."""
        return int(self.store.add("failed_ranks", 0))


def _difference(first: str, rank: int, other: str) -> str:
    if other == "nothing":
        return f"rank {rank} has failed"
    return (
        f"rank 0 computes with {first}, rank {rank} with {other}; all ranks need the same kind of device: "
        "mend the one that lacks CUDA, or set DEVICE=cpu for all"
    )


@contextmanager
def process_group(device: torch.device, meeting: Meeting | None = None) -> Iterator[dist.ProcessGroup]:
    """The default process group: gloo on a CPU, NCCL on CUDA.

    Under torchrun it joins the others; else it is a group of one rank, which opens no port. A program that has used it
    ends by `leave`.

    Args:
        device: of this rank; the others' must be of the same kind.
        meeting: where the ranks have met; None: they meet now.

    Raises:
        UserError: see `Meeting.join` and `Meeting.agree_on_device`.
    """
    meeting = meeting or Meeting.join()
    meeting.agree_on_device(device.type)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("default_pg", meeting.store),
        rank=meeting.rank,
        world_size=meeting.ranks,
        timeout=TIMEOUT,
    )
    group = dist.group.WORLD
    assert group is not None
    try:
        yield group
    finally:
        # Reference cycles may still hold modules and works of this group; they are to go before the group does.
        gc.collect()
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End the process with this exit code: exit functions run, streams are flushed, the interpreter is not shut down.

    A gloo thread may drop the last reference to a finished collective's tensor. If that falls into the interpreter's
    shutdown, the thread is ended in the middle of it and the process aborts ("terminate called without an active
    exception", SIGABRT) after all its work is done; a launcher then sees a failed job. So a program that has used
    `process_group` ends by this function.
    """
    # `os._exit` skips all of this, so it is done by hand: temporary files are removed, and the last lines are not lost.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
