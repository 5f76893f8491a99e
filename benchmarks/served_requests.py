"""Requests for an exported model: histories and candidates of raw values that its dictionaries know."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.serve.columns import RequestColumn, RequestColumns
from schemas.errors import UserError
from schemas.served import ServedManifest

FIRST = datetime(2023, 1, 1, tzinfo=UTC)
"""The first behaviour of each history."""
APART = timedelta(minutes=30)
"""Time between two behaviours."""
MOST_VALUES = 3
"""Values of a feature that has several."""


@dataclass(frozen=True)
class ScoreRequest:
    """What a server is asked, as Python has it and as bytes."""

    history: Mapping[str, Any]
    candidates: Sequence[Mapping[str, Any]]
    body: bytes


def draw_requests(folder: Path, count: int, length: int, candidates: int, seed: int = 0) -> list[ScoreRequest]:
    """Draw requests whose behaviours and candidates are any items, all of them known.

    Args:
        folder: exported model.
        count: how many requests.
        length: N, behaviours of each.
        candidates: C, of each; all at one moment after the last behaviour.
        seed: of the draw.

    Raises:
        UserError: no exported model.
    """
    source = _RawValues(folder, np.random.default_rng(seed))
    return [source.request(length, candidates) for _ in range(count)]


class _RawValues:
    def __init__(self, folder: Path, random: np.random.Generator) -> None:
        self._random = random
        manifest = ServedManifest.read(folder)
        self._columns = RequestColumns.of(manifest.data)
        self._records = {record.name: record for record in manifest.data.features}
        self._known: dict[str, pa.Array] = {}
        for name in ("item", *self._records):
            if (file := manifest.dictionary(name)) is not None:
                path = manifest.verified(folder, file)
                try:
                    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
                except (OSError, pa.ArrowException) as error:
                    raise UserError(f"{path} cannot be read: {error}") from None
                self._known[name] = table["raw_id"].combine_chunks()

    def request(self, length: int, candidates: int) -> ScoreRequest:
        history: dict[str, Any] = {}
        for column in self._in_order(self._columns.history):
            if column.of == "user" and column.role == "feature":
                history.setdefault(column.name, self._values(column, [0])[0])
            elif column.of == "behavior":
                history.setdefault(column.name, self._values(column, range(length)))
        shown = {
            column.name: self._values(column, [length] * candidates)
            for column in self._in_order(self._columns.candidate)
        }
        of_candidates = [dict(zip(shown, values, strict=True)) for values in zip(*shown.values(), strict=True)]
        body = json.dumps({"history": history, "candidates": of_candidates}).encode()
        return ScoreRequest(history, of_candidates, body)

    def _in_order(self, columns: Sequence[RequestColumn]) -> list[RequestColumn]:
        """Columns that are used, but for features of items, which the model knows; those with a dictionary first."""
        used = [
            column
            for column in columns
            if column.required or (column.of == "user" and column.role == "feature" and column.used)
        ]
        # A column may be several features: its values must be known to the dictionary of one.
        return sorted(used, key=lambda column: (column.feature or "item") not in self._known)

    def _values(self, column: RequestColumn, places: Sequence[int]) -> list[Any]:
        """A value for each place; places are counted from the first behaviour."""
        if column.role == "timestamp":
            return [_written(place, column.unit) for place in places]
        if column.role == "filter":
            return self._any_of(self._columns.settings.events.keep[column.read.source], len(places))
        if not column.read.several:
            return self._single(column, len(places))
        counts = self._random.integers(1, MOST_VALUES, len(places), endpoint=True)
        values = iter(self._single(column, int(counts.sum())))
        sets = [[next(values) for _ in range(number)] for number in counts]
        separator = column.read.separator
        return sets if separator is None else [separator.join(map(str, each)) for each in sets]

    def _single(self, column: RequestColumn, count: int) -> list[Any]:
        known = self._known.get("item" if column.role == "item" else column.feature or "")
        if known is not None and len(known):
            values: list[Any] = known.take(pa.array(self._random.integers(len(known), size=count))).to_pylist()
            return values
        if column.read.kind == "number":
            return [round(value, 3) for value in self._random.uniform(0, 100, count).tolist()]
        numbers: list[int] = self._random.integers(1 << 31, size=count).tolist()
        return numbers if column.read.kind == "integer" else [f"value {number}" for number in numbers]

    def _any_of(self, values: Sequence[Any], count: int) -> list[Any]:
        return [values[index] for index in self._random.integers(len(values), size=count)]


def _written(place: int, unit: str) -> int | str:
    """The moment of a behaviour as a log of this unit writes it."""
    if unit == "mmdd":
        # Days of one year: as many behaviours share one as it takes.
        moment = datetime(2023, 1, 1, tzinfo=UTC) + timedelta(days=min(364, place // 32))
        return moment.month * 100 + moment.day
    moment = FIRST + place * APART
    if unit == "datetime":
        return moment.strftime("%Y-%m-%d %H:%M:%S")
    return int(moment.timestamp()) * {"s": 1, "ms": 1000, "us": 1_000_000}[unit]
