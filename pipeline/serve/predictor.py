"""Scores of candidates for a user's history, by an exported model.

C = candidates, L = labels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from embeddings.batch import Branch
from pipeline.serve.columns import RequestColumn, made_up_request
from pipeline.serve.encoding import EncodedRequest, RequestEncoder
from pipeline.serve.history_store import HistoryStore
from pipeline.serve.model import ServedModel
from pipeline.serve.raw import is_listed, said
from pipeline.serve.rows import open_tables
from pipeline.serve.store import open_store
from pipeline.serve.stored_columns import StoredColumns
from pipeline.serve.vocabulary import Vocabulary
from schemas.errors import RequestError, UserError
from schemas.prepare import PrepareSettings
from schemas.served import REMEDY, ServedManifest


class Histories(Protocol):
    """What knows the histories of users: a `HistoryStore`."""

    def history(self, user: object) -> dict[str, Any]:
        """The events of a user, as `HistoryStore.history` has them."""


@dataclass(frozen=True)
class Answer:
    """Scores of a request, and what they rest on."""

    scores: NDArray[np.float64]
    """Probabilities as of `Predictor.score`."""
    behaviors: int
    """Behaviours of the history that count; 0: nobody is known by this history, and anybody would get these scores."""
    unknown_items: int
    """Candidates whose item the model does not know."""


@dataclass(frozen=True)
class Retrieved:
    """A behaviour that a candidate's score looks at."""

    behavior: Mapping[str, Any]
    """Its raw values by column, as they were given."""
    timestamp: int
    """Seconds since 1970."""
    position: int
    """Its index in the history as it was given."""
    sequence: str
    """The sequence that it was retrieved from."""
    weight: float
    """How much attention it gets, 0 .. 1."""


class Predictor:
    """Answers requests with an exported model; `load` opens one. Many threads may use it at once; nothing is written.

    Example:
        >>> predictor = Predictor.load(Path("exported"))
        >>> history = {"customer": 7, "product": [11, 12], "bought_at": [1_700_000_000, 1_700_086_400]}
        >>> predictor.score(history, [{"product": 12, "bought_at": 1_700_172_800}])
        array([0.25...])
    """

    def __init__(
        self,
        folder: Path,
        manifest: ServedManifest,
        model: ServedModel,
        encoder: RequestEncoder,
        store: Histories | None = None,
    ) -> None:
        self._folder, self._manifest, self._model = folder, manifest, model
        self._encoder, self._store = encoder, store
        self._opened: HistoryStore | None = None

    @classmethod
    def load(cls, folder: Path | str, store: Histories | Path | str | None = None) -> Self:
        """Open an exported model. Rows are mapped into memory, and verified as they are read.

        Args:
            folder: what ``dare export`` has written.
            store: has the histories of users who are named by their ids; None: every request brings its history. The
                path or URL of one is opened to be read, and closed by `close`; one that is open already is left open.

        Raises:
            UserError: no exported model, one of another version, a file that differs from its checksum, or files
                that do not go together; no store there, one of other columns than the model's, or something that is
                none.
            StoreError: the store is down.
        """
        if not (store is None or isinstance(store, Path | str) or callable(getattr(store, "history", None))):
            raise UserError(
                f"store is {said(store)}; give the path or URL of a store of histories, or what open_store has opened"
            )
        # A link may be pointed to another model at any moment, and a folder replaced: all is of one manifest.
        folder = Path(folder).resolve()
        manifest = ServedManifest.read(folder)
        try:
            encoder = RequestEncoder(Vocabulary.open(folder, manifest), manifest.stream)
            model = ServedModel.load(folder, manifest)
        except (UserError, OSError, MemoryError):
            raise
        except Exception as error:
            # Files are whole by their checksums, but not those that the manifest tells of.
            shown = f"{type(error).__name__}: {error}"
            raise UserError(f"{folder}: its files do not go together ({shown:.100}); {REMEDY}") from error
        if not isinstance(store, Path | str):
            return cls(folder, manifest, model, encoder, store)
        opened = open_store(str(store), read_only=True)
        try:
            opened.require_columns(StoredColumns.of_settings(encoder.columns.settings))
        except BaseException:
            opened.close()
            raise
        predictor = cls(folder, manifest, model, encoder, opened)
        predictor._opened = opened
        return predictor

    def close(self) -> None:
        """Close the store that `load` has opened by its URL, if there is one."""
        if self._opened is not None:
            self._opened.close()
            self._store = self._opened = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    @property
    def version(self) -> str:
        """Names the model among others: made of its checkpoint and the precision of its rows."""
        return self._manifest.version

    @property
    def model(self) -> str:
        """Name of the member of the family: ``dare``, ``twin``, ..."""
        return self._manifest.model.name

    @property
    def run(self) -> str:
        """Name of the run that it was exported from."""
        return self._manifest.run

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of what is predicted, the main one first: (L,)."""
        tasks = tuple(task.name for task in self._manifest.model.tasks)
        return tasks or self._manifest.data.labels[:1]

    @property
    def settings(self) -> PrepareSettings:
        """The settings of ``dare prepare`` that columns are named and read by; they name no files."""
        return self._encoder.columns.settings

    @property
    def columns(self) -> tuple[RequestColumn, ...]:
        """What requests may have: of the user and of behaviours, which are a history's, and of candidates."""
        found: dict[tuple[bool, str], RequestColumn] = {}
        for column in (*self._encoder.columns.history, *self._encoder.columns.candidate):
            if column.used or column.role == "user":
                key = (column.of == "candidate", column.name)
                former = found.get(key, column)
                # One column may be several features.
                found[key] = replace(former, required=former.required or column.required)
        return tuple(found.values())

    def score(
        self, history: Mapping[str, Any] | str | int, candidates: Sequence[Mapping[str, Any]]
    ) -> NDArray[np.float64]:
        """Predict how likely the user takes each candidate.

        Args:
            history: raw column of the log of behaviours -> list of values, one a behaviour, in any order of time; what
                belongs to the user is one value. Or the raw id of a user in the store.
            candidates: raw column -> value, of each: item and timestamp, and what belongs to the impression. What
                belongs to the item is known; of an item that is unknown it may be given.

        Returns:
            Probabilities, (C,), or (C, L) where the model predicts several labels. Behaviours at the time of a
            candidate or later do not count for it. What no dictionary has is the unknown.

        Raises:
            RequestError: a column or value is missing, unknown or wrong; names it.
            UserError: the user is named, and the store is down; rows of the model are damaged.
        """
        return self.answer(history, candidates).scores

    def answer(self, history: Mapping[str, Any] | str | int, candidates: Sequence[Mapping[str, Any]]) -> Answer:
        """Score candidates as `score` does, and say how much is known of the user and of the candidates."""
        given, filtered = self._history(history)
        encoded = self._encoder.encode(given, candidates, filtered=filtered)
        return Answer(self._scores(encoded), encoded.behaviors, encoded.unknown_items)

    def _scores(self, encoded: EncodedRequest) -> NDArray[np.float64]:
        """Probabilities, (C,) or (C, L)."""
        if not len(encoded.batch):
            return np.zeros((0,) if len(self.labels) == 1 else (0, len(self.labels)))
        # In float64, as `dare score` writes them.
        logits = self._model.answer(encoded.batch).logits
        scores = [logit_C.double().sigmoid().numpy() for logit_C in logits]
        return scores[0] if len(scores) == 1 else np.stack(scores, axis=1)

    def explain(self, history: Mapping[str, Any] | str | int, candidate: Mapping[str, Any]) -> list[Retrieved]:
        """List the behaviours that are retrieved for a candidate, most weight first; errors are those of `score`."""
        given, filtered = self._history(history)
        encoded = self._encoder.encode(given, [candidate], filtered=filtered)
        answer = self._model.answer(encoded.batch)
        lists = {
            column.name: given[column.name]
            for column in self._encoder.columns.history
            if column.of == "behavior" and is_listed(given.get(column.name))
        }
        found = [
            retrieved
            for branch, weight_TK in zip(answer.branches, answer.weights, strict=True)
            for retrieved in _retrieved(encoded, lists, branch, weight_TK)
        ]
        return sorted(found, key=lambda each: -each.weight)

    def seconds(self, history: Mapping[str, Any]) -> list[int]:
        """Seconds since 1970 of a history's behaviours, in the order in which they are given; errors as of `score`."""
        return self._encoder.seconds(history)

    def warm(self) -> None:
        """Answer a made-up request, an unknown item for a history of one: what is compiled when it is first used is.

        Raises:
            RequestError: the data set's columns take no such request.
            UserError: rows of the model are damaged.
        """
        self._scores(self._encoder.encode(*made_up_request(self._encoder.columns)))

    def verify(self) -> None:
        """Compare all rows with their checksums; what is read is compared anyway.

        Raises:
            UserError: rows are damaged.
        """
        for rows in open_tables(self._folder, self._manifest).values():
            rows.verify()

    def _history(self, history: Mapping[str, Any] | str | int) -> tuple[Mapping[str, Any], bool]:
        """A history, and whether only behaviours that count are in it."""
        if isinstance(history, Mapping):
            return history, False
        if isinstance(history, bool) or not isinstance(history, str | Integral):
            raise RequestError(
                f"history is {said(history)}; give a mapping of columns to lists of values ({{}} of somebody new), or "
                "the id of a user in the store"
            )
        if self._store is None:
            raise RequestError("a user's id is given, and there is no store of histories; give the history itself")
        return self._store.history(history), True


def _retrieved(
    encoded: EncodedRequest, lists: Mapping[str, Any], branch: Branch, weight_TK: Tensor
) -> Iterator[Retrieved]:
    """The behaviours of a branch that the only candidate of a request looks at."""
    history, given_M = encoded.batch.histories[branch.sequence], encoded.given[branch.sequence]
    valid_K = branch.chosen.valid_TK[0]
    for index, weight in zip(branch.chosen.index_TK[0][valid_K].tolist(), weight_TK[0][valid_K].tolist(), strict=True):
        position = int(given_M[index])
        behavior = {name: _plain(values[position]) for name, values in lists.items()}
        yield Retrieved(behavior, int(history.timestamp_M[index]), position, branch.sequence, weight)


def _plain(value: Any) -> Any:
    """A value as Python has it."""
    if isinstance(value, pa.Scalar):
        return value.as_py()
    return value.item() if isinstance(value, np.generic) else value
