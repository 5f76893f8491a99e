"""Notices a rank whose process does not answer any more, long before a collective would give up waiting for it.

A process that is stopped, a machine that has frozen, a cable that is out: no connection closes, and the others wait in
a collective. So each rank counts beats in the store, in a thread of its own: a long validation, the first compilation
of a kernel or a slow disk keep the main thread busy, and the beats go on.
"""

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from time import monotonic

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

HANG_SECONDS = "DARE_HANG_SECONDS"
"""Environment variable: after how many seconds without a beat a rank is given up."""
HANG_S = 120.0
"""Its value if it is not set."""
BEATS = 8
"""Beats within that time."""
LEFT = 1 << 40
"""What a rank that ends in order adds to its beats."""
GOODBYE_S = 2.0
"""Seconds for which a rank that ends tries to tell so."""


class RankWatch:
    """Beats for this rank, and watches the beats of the others: the first rank all, the others the first one's.

    Args:
        store: in which the ranks have met; a connection of its own is made.
        rank: this rank.
        ranks: how many there are; a rank alone watches nobody.
        limit_s: seconds without a beat after which a rank is given up.
        lost: called with a line that says which rank does not answer, in a thread; it must end the process.
    """

    def __init__(self, store: Store, rank: int, ranks: int, limit_s: float, lost: Callable[[str], object]) -> None:
        self._rank, self._ranks, self._limit_s, self._lost = rank, ranks, limit_s, lost
        self._leaves = threading.Event()
        self._threads: list[threading.Thread] = []
        if ranks == 1:
            return
        self._store = PrefixStore("beats", store.clone())  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=limit_s))
        self._beat_s = limit_s / BEATS
        self._keys = [str(each) for each in range(ranks)]
        self._answered: float | None = monotonic()
        """When the store has answered last; None: it is gone, with the first rank or its launcher."""
        # What is given up is told from these threads while the main thread waits in a collective for ever.
        for name, loop in (("beats", self._beat), ("silence", self._listen)):
            self._threads.append(threading.Thread(target=loop, name=name, daemon=True))
            self._threads[-1].start()

    def leave(self) -> None:
        """Tell the others that this rank ends and will beat no more."""
        self._leaves.set()
        for thread in self._threads:
            thread.join(GOODBYE_S)

    def _beat(self) -> None:
        seen: dict[str, tuple[int, float]] = {}
        try:
            self._store.set(f"host/{self._rank}", f"{socket.gethostname()}, process {os.getpid()}")
            if self._rank == 0:
                for key in self._keys:  # so that all can be read at once, whoever has come by now
                    self._store.add(key, 0)
            watched = self._keys[1:] if self._rank == 0 else self._keys[:1]
            seen.update(dict.fromkeys(watched, (0, monotonic())))
            looked = monotonic()
            while not self._leaves.wait(self._beat_s):
                self._store.add(self._keys[self._rank], 1)
                beats = self._read(watched)
                now = self._answered = monotonic()
                # Whoever was stopped itself has heard nobody meanwhile: all get a new chance.
                fresh, looked = now - looked > self._limit_s / 2, now
                for key, beat in zip(watched, beats, strict=True):
                    if fresh or beat != seen[key][0] or beat >= LEFT:
                        seen[key] = beat, now
                silent = [key for key in watched if now - seen[key][1] > self._limit_s]
                if silent:
                    self._give_up(silent[0])
                if self._store.check(["lost"]):
                    line = self._store.get("lost").decode()
                    self._store.add("told", 1)
                    self._lost(line)
            self._store.add(self._keys[self._rank], LEFT)
        except (dist.DistError, RuntimeError):
            # The store has gone with its process. Connections of the collectives have closed with it, which the main
            # thread mostly finds out by itself; but gloo waits in one that begins on a connection closed before.
            self._answered = None
            first_has_left = seen.get("0", (0, 0.0))[0] >= LEFT
            if not first_has_left and not self._leaves.wait(self._limit_s):
                self._lost(
                    f"rank {self._rank} of {self._ranks} has lost the process that keeps the ranks together; what is "
                    "complete on disk stays; the same command goes on from there"
                )

    def _read(self, keys: list[str]) -> list[int]:
        if self._rank == 0:
            return [int(beats) for beats in self._store.multi_get(keys)]
        return [int(self._store.add(keys[0], 0))]  # unlike `get` it waits for nothing

    def _give_up(self, key: str) -> None:
        line = self._line(int(key))
        self._store.set("lost", line)
        # The store may live in this process, which must not end before the others have read it.
        until = monotonic() + 4 * self._beat_s
        while monotonic() < until and int(self._store.add("told", 0)) < self._ranks - 2:
            threading.Event().wait(self._beat_s / 4)
        self._lost(line)

    def _listen(self) -> None:
        """Notice that the store itself does not answer: the thread that talks to it is then stuck."""
        looked = monotonic()
        while not self._leaves.wait(self._beat_s) and self._answered is not None:
            now = monotonic()
            if now - looked > self._limit_s / 2:
                self._answered = now  # this process was stopped itself
            looked = now
            if now - self._answered > self._limit_s + self._beat_s:
                self._lost(self._line(0))

    def _line(self, rank: int) -> str:
        host = ""
        if rank > 0 or (self._answered is not None and monotonic() - self._answered < self._limit_s):
            with suppress(dist.DistError, RuntimeError):
                if self._store.check([f"host/{rank}"]):
                    host = f" ({self._store.get(f'host/{rank}').decode()})"
        return (
            f"rank {rank} of {self._ranks}{host} has not answered for {self._limit_s:g} s: its process is stopped, or "
            "its machine or the network hangs; what is complete on disk stays; the same command goes on from there "
            f"({HANG_SECONDS} says how long ranks wait)"
        )
