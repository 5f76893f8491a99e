"""The process group of a run: the ranks meet, agree on a kind of device, form a group, and leave it in order."""

import atexit
import gc
import math
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from schemas.errors import UserError

TIMEOUT = timedelta(minutes=10)
"""A collective that waits longer for another rank is an error. One whose process does not even answer is noticed much
sooner, see `embeddings.distributed.rank_watch`."""

MEETING_SECONDS = "DARE_MEETING_SECONDS"
"""Environment variable: how long a rank waits for all others to come."""
INTERFACES = "GLOO_SOCKET_IFNAME"
"""Environment variable of gloo: names of network interfaces, separated by commas."""
LAUNCHERS = (
    *("TORCHELASTIC_RUN_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"),
    "KUBERNETES_SERVICE_HOST",
)
"""Environment variables of launchers, whose ranks come for certain, though on a large cluster not soon."""
UNLAUNCHED_S = 30.0
"""Seconds to wait for the others where nothing but ``WORLD_SIZE`` speaks of a launcher: it may be left over."""


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return the environment by which `process_group` joins the other ranks, all on this machine, as torchrun sets it.

    Args:
        rank: number of the rank, from 0.
        ranks: how many there are.
        port: port of this machine that is free.
    """
    here = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
    # No launcher's mark is set: the caller starts all ranks, however slowly.
    here[MEETING_SECONDS] = round(TIMEOUT.total_seconds())
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
            UserError: ``WORLD_SIZE`` is set, but another variable of a launcher is missing or wrong, or the other ranks
                do not come.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1" and os.environ.get("RANK", "0") == "0":
            # Memory of this process; the store of several ranks, a TCPStore, would listen on a port.
            return cls(HashStore(), 0, 1)
        launched = any(name in os.environ for name in LAUNCHERS)
        patience_s = seconds_of(MEETING_SECONDS, TIMEOUT.total_seconds() if launched else UNLAUNCHED_S)
        try:
            store, rank, ranks = _rendezvous(timedelta(seconds=patience_s))
        except ValueError as error:  # a variable that is missing, or not a number
            raise UserError(
                f"WORLD_SIZE is set, as by a launcher of ranks, but {error}; use torchrun, or for a single process "
                "unset WORLD_SIZE"
            ) from None
        except dist.DistError as error:
            raise UserError(_not_met(patience_s, error)) from None
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


def seconds_of(name: str, default: float) -> float:
    """Return a number of seconds that an environment variable may say.

    Args:
        name: name of the variable.
        default: if it is not set.

    Raises:
        UserError: it is no positive number.
    """
    text = os.environ.get(name) or str(default)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    # A limit that threads and sockets can wait for: about eleven days.
    if not 0 < seconds <= 1e6:
        raise UserError(f"{name}={text}: a number of seconds is wanted, more than 0 and at most 1000000")
    return seconds


def _rendezvous(patience: timedelta) -> tuple[Store, int, int]:
    """The store, this rank and the number of ranks, once all have come."""
    found: list[tuple[Store, int, int]] = []
    failed: list[BaseException] = []

    def meet() -> None:
        try:
            found.append(next(rendezvous("env://", timeout=patience)))
        except BaseException as error:
            failed.append(error)

    # In a thread: it waits in C++, where the main thread would not see Ctrl-C.
    thread = threading.Thread(target=meet, name="meeting", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if failed:
        raise failed[0]
    return found[0]


def _not_met(patience_s: float, error: BaseException) -> str:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    said = ", ".join(f"{name}={os.environ.get(name, '')}" for name in names)
    if "EADDRINUSE" in str(error):
        return f"{said}: another process has this port of {socket.gethostname()}; give another MASTER_PORT to all ranks"
    return (
        f"{said} are set, but not all of these ranks have come within {patience_s:g} s; for a single process unset "
        f"them; for several, start all (with torchrun), and if they are slow set {MEETING_SECONDS} to more seconds"
    )


def check_interfaces() -> None:
    """Make sure that the network interfaces by which gloo is told to reach the other ranks are there.

    Raises:
        UserError: ``GLOO_SOCKET_IFNAME`` names one that this host does not have.
    """
    said = os.environ.get(INTERFACES, "")
    have = [name for _, name in socket.if_nameindex()]
    if absent := [name for name in said.split(",") if name and name not in have]:
        raise UserError(
            f"{INTERFACES}={said}: {socket.gethostname()} has no network interface {absent[0]}; it has "
            f"{', '.join(have)}; name one of them by which it reaches the other ranks, or unset the variable"
        )


@contextmanager
def _loopback() -> Iterator[None]:
    """Let gloo use this host's loopback, whatever the environment says: a rank alone needs no network."""
    said = os.environ.get(INTERFACES)
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback is not None:
        os.environ[INTERFACES] = loopback
    try:
        yield
    finally:
        os.environ.pop(INTERFACES, None)
        if said is not None:
            os.environ[INTERFACES] = said


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

    Under torchrun it joins the others; else it is a group of one rank, which needs no network but the loopback. A
    program that has used it ends by `leave`.

    Args:
        device: of this rank; the others' must be of the same kind.
        meeting: where the ranks have met; None: they meet now.

    Raises:
        UserError: see `Meeting.join` and `Meeting.agree_on_device`.
    """
    meeting = meeting or Meeting.join()
    if meeting.ranks > 1 and device.type == "cpu":
        check_interfaces()
    meeting.agree_on_device(device.type)
    with _loopback() if meeting.ranks == 1 else nullcontext():
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
