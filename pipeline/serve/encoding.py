"""A request as the batch that ``dare prepare`` and the stream would have made of it.

Raw values go through the conversions of `pipeline.ingest`; behaviours are put in the order of a data set's histories,
and windows are cut as `pipeline.stream.samples` cuts them.

M = behaviours, T = candidates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from embeddings.batch import Batch, History
from pipeline.ingest import times
from pipeline.serve.behaviors import I32, I64, Behaviors, HistoryReader, Request, item_ids
from pipeline.serve.columns import RequestColumn, RequestColumns
from pipeline.serve.raw import Place, columns_of, typed
from pipeline.serve.vocabulary import Vocabulary
from schemas.served import ServedStream
from schemas.stream import ONLY_SEQUENCE

MOST_CANDIDATES = 100_000
"""Candidates of a request; more are several requests."""


@dataclass(frozen=True)
class EncodedRequest:
    """A batch of one user, and where its behaviours stood in the request."""

    batch: Batch
    given: Mapping[str, I64]
    """By sequence, the index of each of the batch's behaviours in the history as it was given."""
    behaviors: int
    """Behaviours of the history that count, whether they are in a window or not."""
    unknown_items: int
    """Candidates whose item the model does not know."""


@dataclass(frozen=True)
class _Sequence:
    length: int
    allowed: Mapping[str, NDArray[np.bool_]]
    """By feature with a condition: whether a behaviour with an id belongs to the sequence."""


class RequestEncoder:
    """Makes batches of requests. Many threads may use it at once.

    Args:
        vocabulary: of the model's data set.
        stream: which behaviours a target sees.

    Raises:
        UserError: a sequence asks for a value that no dictionary has.
    """

    def __init__(self, vocabulary: Vocabulary, stream: ServedStream) -> None:
        data = vocabulary.data
        self.columns = RequestColumns.of(data)
        self._words = vocabulary
        self._read = [record for record in data.features if record.name in data.read]
        self._history = HistoryReader(self.columns, vocabulary)
        self._item, self._time = (
            next(column for column in self.columns.candidate if column.role == role) for role in ("item", "timestamp")
        )
        self._clocks = {each.name: each.time for each in self.columns.settings.declared_features}
        self._sequences = {ONLY_SEQUENCE: _Sequence(stream.history_length, {})}
        if stream.sequences is not None:
            self._sequences = {
                name: _Sequence(
                    sequence.length,
                    {
                        feature: vocabulary.allowed(vocabulary.record(feature), wanted)
                        for feature, (_, wanted) in sequence.conditions.items()
                    },
                )
                for name, sequence in stream.sequences.items()
            }

    def encode(
        self, history: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]], *, filtered: bool = False
    ) -> EncodedRequest:
        """Encode a history and T candidates.

        Args:
            history: raw column -> list of values, one a behaviour, in any order; what belongs to the user is one value.
                Without any list there are no behaviours.
            candidates: raw column -> value, of each.
            filtered: all behaviours count, and no column of those that ``events.keep`` names need be there.

        Returns:
            A batch of T targets whose labels are -1. A behaviour that is not strictly earlier than a target is not in
            its window.

        Raises:
            RequestError: a column or value is missing, unknown or wrong.
        """
        request = Request()
        behaviors, features_U = self._history.read(history, request, filtered=filtered)
        item_T, seconds_T, features_T = self._targets(candidates, request)
        histories, given = {}, {}
        for name, sequence in self._sequences.items():
            histories[name], given[name] = self._cut(sequence, behaviors, seconds_T, request)
        batch = Batch(
            histories=histories,
            user_T=torch.zeros(len(item_T), dtype=torch.int64),
            user_id_U=torch.zeros(1, dtype=torch.int64),
            item_T=torch.from_numpy(self._words.rows_of_items(item_T)),
            # A copy: tensors do not know memory that nobody may write to.
            timestamp_T=torch.from_numpy(seconds_T.copy()),
            features_T=_tensors(features_T),
            labels_T={label: torch.full((len(item_T),), -1.0) for label in self._words.data.labels},
            features_U=_tensors(features_U),
            bags={each.name: bags.bags() for each in self._read if (bags := request.bags_of(each)) is not None},
            origin="request",
        )
        return EncodedRequest(batch, given, len(behaviors.seconds_M), int(np.count_nonzero(item_T == 0)))

    def seconds(self, history: Mapping[str, Any]) -> list[int]:
        """Seconds since 1970 of a history's behaviours, in the order in which they are given; errors as of `encode`."""
        seconds: list[int] = self._history.seconds(history).tolist()
        return seconds

    def _targets(
        self, candidates: Sequence[Mapping[str, Any]], request: Request
    ) -> tuple[I32, I64, dict[str, NDArray[Any]]]:
        """Dense ids, seconds and features of candidates."""
        columns = columns_of(candidates, self.columns.candidate, MOST_CANDIDATES)

        def given(column: RequestColumn) -> tuple[list[Any], str, Place]:
            name = column.name
            return columns.get(name, []), f"candidates: column {name}", lambda index: f"candidates[{index}].{name}"

        seconds_T = request.seconds(self._time, *given(self._time))
        item_T = item_ids(self._words, self._item, *given(self._item))
        features_T: dict[str, NDArray[Any]] = {}
        brought: dict[str, pa.Array] = {}
        for column in self.columns.candidate:
            if column.feature is None or not column.used or (column.name not in columns and not column.required):
                continue
            record = self._words.record(column.feature)
            if record.of != "item":
                array = typed(column, *given(column), set())
                features_T[record.name] = self._words.encoded(record, array, request.bags_of(record))
            elif not item_T.all():
                brought[record.name] = typed(column, *given(column), set())
        for record in self._read:
            clock = self._clocks.get(record.name)
            if clock is not None and record.target:
                shown = times.clock(pa.array(seconds_T), self._time.zone, clock)
                features_T[record.name] = self._words.encoded(record, shown, None)
        return item_T, seconds_T, features_T | self._of_items(item_T, brought, request)

    def _of_items(self, item_X: I32, brought: Mapping[str, pa.Array], request: Request) -> dict[str, NDArray[Any]]:
        """Features of items: as the data set knows them, and of unknown items as they are brought."""
        unknown = np.flatnonzero(item_X == 0)
        features_X = {}
        for record in self._read:
            if record.of != "item":
                continue
            bags = request.bags_of(record)
            features_X[record.name] = self._words.of_items(record, item_X, bags)
            if len(unknown) and record.name in brought:
                values = brought[record.name].take(pa.array(unknown))
                features_X[record.name][unknown] = self._words.encoded(record, values, bags)
        return features_X

    def _cut(self, sequence: _Sequence, behaviors: Behaviors, seconds_T: I64, request: Request) -> tuple[History, I64]:
        """A sequence as far as the windows of the candidates reach, and where its behaviours were given."""
        kept_M = np.ones(len(behaviors.seconds_M), np.bool_)
        for name, allowed in sequence.allowed.items():
            bags = request.bags_of(self._words.record(name))
            id_M = behaviors.features_M[name]
            kept_M &= allowed[id_M] if bags is None else bags.with_any(allowed, id_M)
        index_M = np.flatnonzero(kept_M)
        end_T = np.searchsorted(behaviors.seconds_M[index_M], seconds_T, side="left").astype(np.int64)
        start_T = np.maximum(end_T - sequence.length, 0)
        first, last = (int(start_T.min()), int(end_T.max())) if len(end_T) else (0, 0)
        index_M = index_M[first:last]
        item_M = behaviors.item_M[index_M]
        brought = {name: column.take(pa.array(index_M)) for name, column in behaviors.brought.items()}
        read = {record.name for record in self._read}
        features_M = {name: column_M[index_M] for name, column_M in behaviors.features_M.items() if name in read}
        history = History(
            item_M=torch.from_numpy(self._words.rows_of_items(item_M)),
            timestamp_M=torch.from_numpy(behaviors.seconds_M[index_M]),
            features_M=_tensors(features_M | self._of_items(item_M, brought, request)),
            offset_U=torch.tensor([0, len(index_M)]),
            start_T=torch.from_numpy(start_T - first),
            end_T=torch.from_numpy(end_T - first),
        )
        return history, behaviors.given_M[index_M]


def _tensors(columns: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(column) for name, column in columns.items()}
