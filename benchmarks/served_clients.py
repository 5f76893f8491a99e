"""Clients of a server: threads with a connection each, which compare every answer with `Predictor.score`."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import numpy as np
import requests
from numpy.typing import NDArray

from benchmarks.served_process import session
from benchmarks.served_requests import ScoreRequest, draw_requests
from pipeline.serve.predictor import Predictor

CLOSE = 1e-6
"""Scores that differ by more are others."""
TIMEOUT_S = 60.0
"""Longer than the server's own: it is the server that says that it was too late."""
USERS = 8
"""Requests are of so many users in turn, so that a history is not in the processor's caches because it was the last."""
IDLE_S = 2.0
"""A client does not use a connection again that was idle for longer. The server closes such in the end, and what is
sent at that very moment is lost."""
OTHER_SCORES = "other scores"


@dataclass(frozen=True)
class Sent:
    """A request and what became of it, times by `time.monotonic`."""

    due: float
    """When it was to be sent."""
    answered: float
    error: str | None
    version: str | None

    @property
    def milliseconds(self) -> float:
        """From when it was to be sent to its answer."""
        return (self.answered - self.due) * 1e3


class Asked:
    """Requests and the scores that each model gives them."""

    def __init__(self, folders: Sequence[Path], length: int, candidates: int) -> None:
        """Draw requests from the first model's dictionaries, and score them with each; see `draw_requests`."""
        self.predictors = [Predictor.load(folder) for folder in folders]
        self.requests: list[ScoreRequest] = draw_requests(folders[0], USERS, length, candidates)
        self._scores: dict[str, list[NDArray[np.float64]]] = {
            predictor.version: [predictor.score(each.history, each.candidates) for each in self.requests]
            for predictor in self.predictors
        }
        self._labels = {predictor.version: predictor.labels for predictor in self.predictors}

    def difference(self, number: int, answer: Mapping[str, Any]) -> float:
        """How far an answer is from the scores of the model that it names; infinity where it names no known one."""
        version, scores = answer.get("model"), answer.get("scores")
        if version not in self._scores or scores is None:
            return float("inf")
        expected = self._scores[version][number]
        given = np.array(scores if expected.ndim == 1 else [scores[label] for label in self._labels[version]]).T
        return float("inf") if given.shape != expected.shape else float(np.abs(given - expected).max(initial=0))


class Client:
    """A connection to a server."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/score"
        self._session = session()
        self._session.headers["Content-Type"] = "application/json"
        self._used = 0.0

    def ask(self, asked: Asked, number: int, due: float) -> Sent:
        """Send a request, by its number, and compare the answer."""
        error = version = None
        if time.monotonic() - self._used > IDLE_S:
            self._session.close()
        try:
            response = self._session.post(self._url, data=asked.requests[number].body, timeout=TIMEOUT_S)
            answered = time.monotonic()
            if response.status_code != 200:
                error = f"status {response.status_code}"
            else:
                answer = response.json()
                version = answer["model"]
                if not asked.difference(number, answer) <= CLOSE:
                    error = OTHER_SCORES
        except requests.RequestException as failed:
            answered, error = time.monotonic(), type(failed).__name__
        self._used = answered
        return Sent(due, answered, error, version)


class Clients:
    """Threads that send requests at given moments."""

    def __init__(self, asked: Asked, url: str, count: int, due: Iterator[float]) -> None:
        """Start.

        Args:
            asked: the requests, which are taken in turn.
            url: of the server.
            count: how many threads.
            due: when each request is to be sent, by `time.monotonic`.
        """
        self._asked, self._url, self._due = asked, url, enumerate(due)
        self._lock = Lock()
        self.sent: list[Sent] = []
        self._failed: list[BaseException] = []
        self._threads = [Thread(target=self._work, name=f"client-{number}", daemon=True) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        client = Client(self._url)
        try:
            while True:
                with self._lock:
                    number, due = next(self._due, (0, None))
                if due is None:
                    return
                time.sleep(max(0.0, due - time.monotonic()))
                self.sent.append(client.ask(self._asked, number % USERS, due))
        except BaseException as error:
            self._failed.append(error)
            raise

    def all(self) -> list[Sent]:
        """What became of all requests, when the last one is answered."""
        for thread in self._threads:
            thread.join()
        if self._failed:
            raise self._failed[0]
        return self.sent


def at_once(seconds: float) -> Iterator[float]:
    """Moments of a closed loop: now, until some time has passed."""
    end = time.monotonic() + seconds
    while (now := time.monotonic()) < end:
        yield now


def at_random(rate: float, seconds: float, seed: int = 0) -> Iterator[float]:
    """Moments of an open loop, as many a second on average as ``rate`` says (Poisson)."""
    random, moment = np.random.default_rng(seed), time.monotonic()
    end = moment + seconds
    while (moment := moment + float(random.exponential(1 / rate))) < end:
        yield moment


def errors_of(sent: Iterable[Sent]) -> Counter[str]:
    """Count errors by kind."""
    return Counter(each.error for each in sent if each.error is not None)


def percentiles(sent: Sequence[Sent]) -> tuple[float, float]:
    """p50 and p99, in milliseconds, of what was answered; nan where nothing was."""
    taken = [each.milliseconds for each in sent if each.error is None]
    if not taken:
        return float("nan"), float("nan")
    p50, p99 = np.percentile(taken, [50, 99]).tolist()
    return p50, p99
