"""What the server computes for each kind of request."""

import time
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

from pipeline.serve import bodies
from pipeline.serve.bodies import UserId
from pipeline.serve.swap import Models
from schemas.errors import RequestError, StoreError
from schemas.serving import ServeSettings

if TYPE_CHECKING:
    from pipeline.serve.history_store import HistoryStore
    from pipeline.serve.predictor import Predictor


ASK_AGAIN_S = 1.0
"""Seconds after which a store that was down is asked again."""


class StoreOnDemand:
    """A store of histories that is opened when it is first asked: it may be down when the server starts."""

    def __init__(self, open_store: "Callable[[], HistoryStore]") -> None:
        """Open nothing yet; ``open_store`` is called until it has returned a store."""
        self._open_store = open_store
        self._opened: HistoryStore | None = None
        self._opening = Lock()
        self._down: StoreError | None = None
        self._ask_again = 0.0

    def opened(self) -> "HistoryStore":
        """The store.

        Raises:
            StoreError: it is down.
        """
        with self._opening:
            if self._opened is None:
                # Requests that wait here while it does not answer shall not each wait for it in turn.
                if self._down is not None and time.monotonic() < self._ask_again:
                    raise self._down
                try:
                    self._opened = self._open_store()
                except StoreError as error:
                    self._down, self._ask_again = StoreError(str(error)), time.monotonic() + ASK_AGAIN_S
                    raise
            return self._opened

    def history(self, user: object) -> dict[str, Any]:
        """The events of a user; see `HistoryStore.history`."""
        return self.opened().history(user)

    def close(self) -> None:
        """Let go of the store."""
        if self._opened is not None:
            self._opened.close()


class Answers:
    """Answers to requests, from models and a store of histories; safe from many threads.

    What all of them raise: `RequestError` if what was asked cannot be answered, `StoreError` if the store is down.
    """

    def __init__(self, models: Models, settings: ServeSettings, store: StoreOnDemand | None) -> None:
        """Know where answers come from.

        Args:
            models: that answer; they take the histories of users from the store themselves.
            settings: limits.
            store: of histories; None: requests bring them.
        """
        self.models = models
        self._settings = settings
        self._store = store

    def store(self) -> "HistoryStore":
        """The store of histories.

        Raises:
            RequestError: there is none.
            StoreError: it is down.
        """
        if self._store is None:
            raise RequestError(
                "user: this server has no store of histories; send the history, or start it with --store"
            )
        return self._store.opened()

    def score(self, body: bodies.ScoreRequest) -> bodies.Scores:
        """Score candidates."""
        if len(body.candidates) > self._settings.max_candidates:
            raise RequestError(
                f"candidates: {len(body.candidates)} are more than the {self._settings.max_candidates} that this "
                "server takes"
            )
        model = self.models.one(body.model)
        answer = model.answer(self._history(body), body.candidates)
        found = answer.scores
        return bodies.Scores(
            model=model.version,
            scores=found.tolist()
            if found.ndim == 1
            else {label: found[:, number].tolist() for number, label in enumerate(model.labels)},
            history=answer.behaviors,
            unknown_items=answer.unknown_items,
        )

    def explain(self, body: bodies.ExplainRequest) -> bodies.Explanations:
        """Say what each model, or the one that was asked, makes of a candidate."""
        history = self._history(body)
        asked = self.models.all() if body.model is None else {body.model: self.models.one(body.model)}
        return bodies.Explanations(
            models=[_explained(name, model, history, body.candidate) for name, model in asked.items()]
        )

    def append(self, body: bodies.AppendRequest) -> bodies.Appended:
        """Add events to the store."""
        self._check_length("events", body.events)
        added = self.store().append(body.user, body.events)
        return bodies.Appended(appended=int(added), known=added.known, not_kept=added.not_kept)

    def history(self, body: bodies.HistoryRequest) -> bodies.History:
        """What the store keeps of a user."""
        found = self.store().history(body.user)
        return bodies.History(history=found, times=self.models.one(None).seconds(found))

    def times(self, body: bodies.TimesRequest) -> bodies.Times:
        """When the events of a history were."""
        self._check_length("history", body.history)
        return bodies.Times(times=self.models.one(None).seconds(body.history))

    def users(self, body: bodies.UsersRequest) -> bodies.Users:
        """Some users of the store."""
        return bodies.Users(users=list(self.store().users(body.first, body.count)))

    def health(self) -> bodies.Health:
        """Whether requests are answered, and by what."""
        loaded = self._models()
        return bodies.Health(
            status="ready" if self.models.ready else "loading",
            model=loaded[0].model if loaded else None,
            models=loaded,
            store=self._store is not None,
        )

    def described(self) -> bodies.Described:
        """What the models take."""
        columns = {
            (column.of, column.name): bodies.Column(
                name=column.name, of=column.of, role=column.role, kind=column.kind, required=column.required
            )
            for model in self.models.all().values()
            for column in model.columns
        }
        return bodies.Described(
            models=self._models(),
            columns=list(columns.values()),
            store=self._store is not None,
            max_candidates=self._settings.max_candidates,
            max_behaviors=self._settings.max_behaviors,
        )

    def _models(self) -> list[bodies.Model]:
        return [
            bodies.Model(name=name, model=model.version, kind=model.model, labels=list(model.labels))
            for name, model in self.models.all().items()
        ]

    def _history(self, body: bodies.ScoreRequest | bodies.ExplainRequest) -> dict[str, Any] | UserId:
        """The history that a request has, or whose the store has."""
        if body.history is not None:
            self._check_length("history", body.history)
            return body.history
        assert body.user is not None, "a request has a history or a user"
        self.store()
        return body.user

    def _check_length(self, where: str, columns: Mapping[str, Any]) -> None:
        most = self._settings.max_behaviors
        for name, values in columns.items():
            if isinstance(values, Sequence) and not isinstance(values, str) and len(values) > most:
                raise RequestError(
                    f"{where}: {name} has {len(values)} values, more than the {most} that this server takes"
                )


def _explained(
    name: str, model: "Predictor", history: Mapping[str, Any] | UserId, candidate: Mapping[str, Any]
) -> bodies.Explanation:
    scores = model.score(history, [candidate]).ravel().tolist()
    return bodies.Explanation(
        name=name,
        model=model.version,
        scores=dict(zip(model.labels, scores, strict=True)),
        retrieved=[
            bodies.Retrieved(
                behavior=dict(each.behavior), time=each.timestamp, weight=each.weight, sequence=each.sequence
            )
            for each in model.explain(history, candidate)
        ],
    )
