"""`dare serve` as its users meet it: what HTTP adds to an answer, answers under load, and a soak with swaps and a kill.

The server is a process of its own on loopback; its clients are threads of this one, with a connection each. Every
answer is compared with what `Predictor.score` says of the same request.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.served_clients import CLOSE, USERS, Asked, Clients, Sent, at_once, at_random, errors_of, percentiles
from benchmarks.served_process import ServedProcess, session
from schemas.errors import UserError

WARM_UP = 2
"""Rounds over all requests before a timing."""
KILLED_AT = 1 / 3
"""Part of a soak after which the server is killed: the second half, over which memory is measured, is of one process
that has warmed up."""


@dataclass(frozen=True)
class HttpFigures:
    """What HTTP adds: one client that asks one request after the other."""

    requests: int
    predictor_p50_ms: float
    """Of `Predictor.score` in this process, in turns with the server."""
    http_p50_ms: float
    more_ms: float
    """Of the p50."""
    least_more_ms: float
    """Of the shortest of each side, which a busy machine changes least."""
    predictor_cpu_ms: float
    """Time that processors work for a request, on average."""
    http_cpu_ms: float
    """The same for both ends of a request over HTTP."""
    largest_difference: float
    """Between scores of both sides."""


@dataclass(frozen=True)
class LoadFigures:
    """Answers under load."""

    clients: int
    """Of the closed loop: as many as the server works on, and lets wait."""
    highest_per_s: float
    """Answers a second when each client asks again at once."""
    rate_per_s: float
    """Half of it: requests that come at random moments, whether others are answered or not."""
    requests: int
    p50_ms: float
    """From the moment at which a request was to be sent."""
    p99_ms: float
    p99_over_p50: float
    errors: Mapping[str, int]
    """By kind, of both loops."""


@dataclass(frozen=True)
class SoakFigures:
    """Hours in small: requests at half the highest rate, while models are swapped and the server is killed once."""

    minutes: float
    rate_per_s: float
    requests: int
    p50_ms: float
    p99_ms: float
    errors: Mapping[str, int]
    """By kind; none of the following."""
    in_flight_at_kill: int
    """Requests that were on their way when the server was killed, and were not answered."""
    while_down: int
    """Requests that were to be sent between the kill and the moment when the server was ready again."""
    down_s: float
    swaps: int
    """Models that took the place of others."""
    by_version: Mapping[str, int]
    """Answers by version of the model that gave them."""
    memory_mib: Sequence[float]
    """Resident memory of the server, a value for each part between two swaps."""
    memory_kib_per_minute: float
    """Its slope over the second half."""
    anonymous_kib_per_minute: float
    """The slope of what is no file mapped into memory."""


def measure_http(asked: Asked, server: ServedProcess, count: int) -> HttpFigures:
    """Measure the same requests over HTTP and in this process, in turns.

    Raises:
        UserError: the server gives other scores.
    """
    predictor, client = asked.predictors[0], session()
    headers = {"Content-Type": "application/json"}
    ours, theirs, difference = list[float](), list[float](), 0.0
    our_cpu, their_cpu = list[float](), list[float]()

    def by_http(number: int) -> None:
        nonlocal difference
        begun, cpu = time.perf_counter(), time.thread_time()
        response = client.post(f"{server.url}/score", data=asked.requests[number].body, headers=headers)
        answer = response.json()
        theirs.append(time.perf_counter() - begun)
        their_cpu.append(time.thread_time() - cpu)
        if response.status_code != 200:
            raise UserError(f"the server does not answer: {answer.get('error')}")
        difference = max(difference, asked.difference(number, answer))

    def in_process(number: int) -> None:
        request, begun, cpu = asked.requests[number], time.perf_counter(), time.process_time()
        predictor.score(request.history, request.candidates)
        ours.append(time.perf_counter() - begun)
        our_cpu.append(time.process_time() - cpu)

    sides = [by_http, in_process]
    of_server = server.cpu_s()
    for round_ in range(-WARM_UP * USERS, count):
        if round_ == 0:
            for taken in (ours, theirs, our_cpu, their_cpu):
                taken.clear()
            of_server = server.cpu_s()
        # Neither side is always the one that finds the other's rows in the caches.
        for side in sides if round_ % 2 else reversed(sides):
            side(round_ % USERS)
    if not difference <= CLOSE:
        raise UserError(f"scores over HTTP differ from those of the Predictor by {difference:g}")
    predictor_ms, http_ms = float(np.median(ours)) * 1e3, float(np.median(theirs)) * 1e3
    return HttpFigures(
        requests=count,
        predictor_p50_ms=round(predictor_ms, 2),
        http_p50_ms=round(http_ms, 2),
        more_ms=round(http_ms - predictor_ms, 2),
        least_more_ms=round((min(theirs) - min(ours)) * 1e3, 2),
        predictor_cpu_ms=round(float(np.mean(our_cpu)) * 1e3, 2),
        http_cpu_ms=round((server.cpu_s() - of_server + sum(their_cpu)) / count * 1e3, 2),
        largest_difference=difference,
    )


def measure_load(asked: Asked, server: ServedProcess, seconds: float) -> LoadFigures:
    """Find the highest rate, and measure answers at half of it.

    Raises:
        UserError: nothing was answered.
    """
    clients = server.threads + server.queue
    begun = time.monotonic()
    closed = Clients(asked, server.url, clients, at_once(seconds)).all()
    took = time.monotonic() - begun
    highest = sum(each.error is None for each in closed) / took
    if not highest:
        raise UserError(f"the server answers nothing: {dict(errors_of(closed))}")
    half = Clients(asked, server.url, clients, at_random(highest / 2, seconds)).all()
    p50, p99 = percentiles(half)
    return LoadFigures(
        clients=clients,
        highest_per_s=round(highest, 1),
        rate_per_s=round(highest / 2, 1),
        requests=len(half),
        p50_ms=round(p50, 2),
        p99_ms=round(p99, 2),
        p99_over_p50=round(p99 / p50, 2),
        errors=dict(errors_of(closed) + errors_of(half)),
    )


@dataclass
class _Down:
    """When the server was killed, and when it was ready again, by `time.monotonic`."""

    killed: float = float("inf")
    ready: float = float("inf")


@dataclass
class _Watched:
    """What is seen of a server during a soak."""

    moments: list[float] = field(default_factory=list)
    resident_kib: list[int] = field(default_factory=list)
    anonymous_kib: list[int] = field(default_factory=list)
    by_part_mib: list[float] = field(default_factory=list)
    swaps: int = 0

    def look(self, server: ServedProcess) -> None:
        resident, anonymous = server.memory_kib()
        self.moments.append(time.monotonic())
        self.resident_kib.append(resident)
        self.anonymous_kib.append(anonymous)

    def slopes(self, since: float) -> tuple[float, float]:
        """KiB a minute of both, since a moment."""
        moment = np.array(self.moments)
        if (moment >= since).sum() < 2:
            return 0.0, 0.0
        minute = (moment[moment >= since] - since) / 60
        resident, anonymous = (
            float(np.polyfit(minute, np.array(kib)[moment >= since], 1)[0])
            for kib in (self.resident_kib, self.anonymous_kib)
        )
        return resident, anonymous


def soak(
    asked: Asked, server: ServedProcess, folders: Sequence[Path], rate: float, seconds: float, swap_every: float
) -> SoakFigures:
    """Ask for a long time; tell a line at each swap.

    Args:
        asked: the requests.
        server: is killed with SIGKILL after a third of the time, started again, and left running.
        folders: exported models, of which one after the other answers.
        rate: requests a second.
        seconds: how long.
        swap_every: seconds between two swaps.
    """
    begun = time.monotonic()
    down, watched = _Down(), _Watched()
    clients = Clients(asked, server.url, server.threads + server.queue, at_random(rate, seconds))
    failed = Counter[str]()
    next_swap, told = begun + swap_every, 0
    while (now := time.monotonic()) < begun + seconds:
        if now >= begun + seconds * KILLED_AT and down.killed == float("inf"):
            down.killed = now
            server.kill()
            server.start()
            down.ready = time.monotonic()
        elif now >= next_swap:
            next_swap += swap_every
            watched.swaps += 1
            if (refused := server.reload(folders[watched.swaps % len(folders)])) is not None:
                failed[f"reload: {refused}"] += 1
            watched.by_part_mib.append(round(watched.resident_kib[-1] / 1024, 1))
            new, told = clients.sent[told:], len(clients.sent)
            _tell((now - begun) / 60, new, watched)
        watched.look(server)
        time.sleep(max(0.0, min(1.0, swap_every / 4)))
    sent = clients.all()
    on_its_way = [each for each in sent if each.error and each.due < down.killed <= each.answered]
    while_down = [each for each in sent if each.error and down.killed <= each.due < down.ready]
    counted = {id(each) for each in (*on_its_way, *while_down)}
    answered = [each for each in sent if each.error is None]
    # Those that waited for the server to come back say nothing of how fast it is.
    p50, p99 = percentiles([each for each in answered if not down.killed <= each.due < down.ready])
    resident, anonymous = watched.slopes(begun + seconds / 2)
    return SoakFigures(
        minutes=round(seconds / 60, 2),
        rate_per_s=round(rate, 1),
        requests=len(sent),
        p50_ms=round(p50, 2),
        p99_ms=round(p99, 2),
        errors=dict(errors_of(each for each in sent if id(each) not in counted) + failed),
        in_flight_at_kill=len(on_its_way),
        while_down=len(while_down),
        down_s=round(down.ready - down.killed, 1),
        swaps=watched.swaps,
        by_version=dict(Counter(each.version for each in answered if each.version)),
        memory_mib=watched.by_part_mib,
        memory_kib_per_minute=round(resident, 1),
        anonymous_kib_per_minute=round(anonymous, 1),
    )


def measure(
    folders: Sequence[Path], length: int, candidates: int, count: int, seconds: float, soak_minutes: float
) -> dict[str, Any]:
    """Measure a server: figures by name.

    Args:
        folders: exported models; the first one answers, and a soak swaps them. One alone is loaded again and again.
        length: N, behaviours of a history.
        candidates: C.
        count: requests of the timing of HTTP's own cost.
        seconds: of each of the two loops.
        soak_minutes: 0: no soak.

    Raises:
        UserError: no exported model, or a server that does not start or gives other scores.
    """
    asked = Asked(folders, length, candidates)
    root = Path(os.path.commonpath([folder.resolve().parent for folder in folders]))
    with ServedProcess(folders[0], root) as server:
        found: dict[str, Any] = {"http": measure_http(asked, server, count)}
        print(found["http"], file=sys.stderr, flush=True)
        load = found["load"] = measure_load(asked, server, seconds)
        print(load, file=sys.stderr, flush=True)
        if soak_minutes:
            found["soak"] = soak(asked, server, folders, load.rate_per_s, soak_minutes * 60, min(60, soak_minutes * 12))
    return found


def _tell(minute: float, sent: Sequence[Sent], watched: _Watched) -> None:
    p50, p99 = percentiles(sent)
    print(
        f"minute {minute:.1f}: {len(sent)} requests, p50 {p50:.1f} ms, p99 {p99:.1f}, errors {dict(errors_of(sent))}, "
        f"memory {watched.resident_kib[-1] / 1024:.1f} MiB, {watched.swaps} swaps",
        file=sys.stderr,
        flush=True,
    )
