"""The history of a request: its behaviours with dense ids, in the order of a data set's histories, and its user.

N = behaviours that are given, M = those that count.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.ingest import times
from pipeline.serve.columns import RequestColumn, RequestColumns
from pipeline.serve.raw import (
    Place,
    arrow_array,
    check_names,
    is_listed,
    require_all,
    require_range,
    said,
    typed,
)
from pipeline.serve.sets import RequestBags
from pipeline.serve.vocabulary import Vocabulary, numbers_of
from schemas.errors import RequestError
from schemas.shards import FeatureRecord

I64 = NDArray[np.int64]
I32 = NDArray[np.int32]

MOST_BEHAVIORS = 10_000_000
"""Behaviours of a request, as many as a window can have."""


Sortable = Callable[[], NDArray[Any]]
"""Makes a column, (M,), that lines are sorted by where times and items are equal; mostly none are."""


class Request:
    """What the parts of one request share: the sets of its features, and how its times are written."""

    def __init__(self) -> None:
        self._bags: defaultdict[str, RequestBags] = defaultdict(RequestBags)
        self._local: str | None = None
        self._zoned: str | None = None

    def bags_of(self, record: FeatureRecord) -> RequestBags | None:
        """The sets of a feature; None: it has one value."""
        return self._bags[record.name] if record.kind == "ids" else None

    def seconds(self, column: RequestColumn, raw: Any, name: str, place: Place) -> I64:
        """Seconds since 1970 of a column of times, all of which are there.

        Raises:
            RequestError: no times, times before 1970 or after 9999, or some that say which moment they are beside
                others that do not, and no zone of the log either.
        """
        forms: set[str] = set()
        array = typed(column, raw, name, place, forms)
        require_all(array, place)
        require_range(array, times.LATEST, place, "a time before 1970 or after 9999; is it of another unit?")
        if "local" in forms and column.zone is None:
            self._local = name
        if "zoned" in forms:
            self._zoned = name
        if self._local and self._zoned:
            raise RequestError(
                f"{self._local} has times without an offset, {self._zoned} times with one; give all of them one, such "
                "as +08:00 or Z"
            )
        seconds: I64 = array.to_numpy()
        return seconds


@dataclass(frozen=True)
class Behaviors:
    """Those of a request that count, in time order."""

    given_M: I64
    """Index of each in the history as it was given."""
    seconds_M: I64
    item_M: I32
    """Dense ids, 0 for the unknown."""
    features_M: Mapping[str, NDArray[Any]]
    """Features of behaviours, as a model sees them."""
    brought: Mapping[str, pa.Array]
    """Raw values of items' features that are given beside the behaviours, (M,) each; none where all items are known."""


class HistoryReader:
    """Reads the histories of requests. Many threads may use it at once.

    Args:
        columns: what a history may have.
        vocabulary: of the model's data set.
    """

    def __init__(self, columns: RequestColumns, vocabulary: Vocabulary) -> None:
        self._columns, self._words = columns.history, vocabulary
        self._keep, self._since = columns.settings.events.keep, columns.settings.events.since
        (self._time,) = self._of("timestamp")
        (self._item,) = self._of("item")
        self._clocks = {
            each.name: each.time
            for each in columns.settings.declared_features
            if each.time is not None and each.of == "behavior"
        }
        self._names = {column.name for column in columns.history}
        self._lists = {column.name for column in columns.history if column.of == "behavior"}
        self._required = {column.name for column in columns.history if column.required}

    def read(
        self, history: Mapping[str, Any], request: Request, *, filtered: bool = False
    ) -> tuple[Behaviors, dict[str, NDArray[Any]]]:
        """Read a history.

        Args:
            history: raw column -> list of N values, and of what belongs to the user one value.
            request: that it is part of.
            filtered: all behaviours count, and no column of those that ``events.keep`` names need be there.

        Returns:
            The behaviours, and the features of the user, (1,) each, as a model sees them.

        Raises:
            RequestError: a column or value is missing, unknown or wrong.
        """
        filters = {column.name for column in self._of("filter")}
        lists = self._arrays(history, filters if filtered else set())
        counted = self._counted(lists, request)
        item_M = item_ids(self._words, self._item, *counted.of(self._item))
        features_M, sort_by = self._features(counted, request)
        brought = {} if item_M.all() else self._brought(counted)
        features_U = self._user(history, counted, request)
        order_M = _order(counted.seconds_M, item_M, sort_by)
        behaviors = Behaviors(
            counted.given_M[order_M],
            counted.seconds_M[order_M],
            item_M[order_M],
            {name: column_M[order_M] for name, column_M in features_M.items()},
            {name: column.take(pa.array(order_M)) for name, column in brought.items()},
        )
        return behaviors, features_U

    def seconds(self, history: Mapping[str, Any]) -> I64:
        """Seconds since 1970 of the behaviours that are given, (N,), in their order there; errors as of `read`."""
        raw = self._arrays(history, self._required - {self._time.name})[self._time.name]
        return Request().seconds(self._time, raw, f"history.{self._time.name}", place_of(self._time.name))

    def _of(self, role: str) -> list[RequestColumn]:
        return [column for column in self._columns if column.role == role]

    def _side(self, column: RequestColumn) -> str:
        assert column.feature is not None
        return self._words.record(column.feature).of

    def _arrays(self, history: Mapping[str, Any], not_required: set[str]) -> dict[str, pa.Array]:
        """The columns of behaviours, all of one length; where none is given, empty ones of those that are required."""
        if not isinstance(history, Mapping):
            raise RequestError(f"history is {said(history)}; give lists of values by column")
        given = self._lists & history.keys()
        required = self._required - not_required if given else set()
        check_names("history", frozenset(history), self._names, required, {self._item.name, self._time.name})
        for name in given:
            if not is_listed(history[name]):
                raise RequestError(f"history.{name} is {said(history[name])}; give a list, with a value a behaviour")
        lengths = sorted((len(history[name]), name) for name in given)
        if lengths and lengths[0][0] != lengths[-1][0]:
            (few, short), (many, long) = lengths[0], lengths[-1]
            raise RequestError(
                f"history.{short} has {few:,} values, history.{long} has {many:,}; give each behaviour a value in "
                "both, null where one is missing"
            )
        if lengths and lengths[0][0] > MOST_BEHAVIORS:
            raise RequestError(f"history has {lengths[0][0]:,} behaviours; at most {MOST_BEHAVIORS:,} are taken")
        if not given:
            return {name: pa.nulls(0) for name in self._required}
        return {name: arrow_array(history[name], f"history.{name}", place_of(name)) for name in given}

    def _counted(self, lists: Mapping[str, pa.Array], request: Request) -> "_Counted":
        """The behaviours that the settings of the data set do not leave out."""
        given = _Counted(lists, np.arange(len(lists[self._item.name])), np.zeros(0, np.int64))
        # Before all other columns are read: what is filtered may hold whatever it likes.
        for column in self._of("filter"):
            if column.name not in lists:
                continue
            kept = pc.is_in(given.typed(column), pa.array(self._keep[column.read.source], pa.string()))
            given = given.where(kept.to_numpy(zero_copy_only=False))
        seconds_M = request.seconds(self._time, *given.of(self._time))
        given = _Counted(lists, given.given_M, seconds_M)
        return given if self._since is None else given.where(seconds_M >= self._since)

    def _features(self, counted: "_Counted", request: Request) -> tuple[dict[str, NDArray[Any]], dict[str, Sortable]]:
        """Features of behaviours as a model sees them, and what lines are sorted by where times and items are equal."""
        features_M: dict[str, NDArray[Any]] = {}
        sort_by: dict[str, Sortable] = {}
        for column in self._of("feature"):
            if column.of == "user" or self._side(column) != "behavior" or column.name not in counted.lists:
                continue
            record = self._words.record(str(column.feature))
            if self._words.knows(record):
                raw, bags = counted.typed(column), request.bags_of(record)
                features_M[record.name] = self._words.encoded(record, raw, bags)
                sort_by[record.name] = partial(_sortable, features_M[record.name], raw, bags)
        for name, clock in self._clocks.items():
            record = self._words.record(name)
            if self._words.knows(record):
                shown = times.clock(pa.array(counted.seconds_M), self._time.zone, clock)
                features_M[name] = self._words.encoded(record, shown, None)
                sort_by[name] = partial(_sortable, features_M[name], shown, None)
        return features_M, sort_by

    def _brought(self, counted: "_Counted") -> dict[str, pa.Array]:
        """Features of items that are given beside the behaviours."""
        return {
            str(column.feature): counted.typed(column)
            for column in self._of("feature")
            if column.of == "behavior" and column.used and column.name in counted.lists and self._side(column) == "item"
        }

    def _user(self, history: Mapping[str, Any], counted: "_Counted", request: Request) -> dict[str, NDArray[Any]]:
        """Features of the user that the model reads, (1,) each."""
        features_U = {}
        for column in self._of("feature"):
            if column.of == "user" and column.used:
                record = self._words.record(str(column.feature))
                value = _value_of_user(column, history.get(column.name), counted)
                features_U[record.name] = self._words.encoded(record, value, request.bags_of(record))
        return features_U


@dataclass(frozen=True)
class _Counted:
    """Columns of behaviours, and which of them count."""

    lists: Mapping[str, pa.Array]
    given_M: I64
    seconds_M: I64

    def where(self, kept_M: NDArray[np.bool_]) -> "_Counted":
        """Some of those that count."""
        seconds_M = self.seconds_M[kept_M] if len(self.seconds_M) else self.seconds_M
        return _Counted(self.lists, self.given_M[kept_M], seconds_M)

    def of(self, column: RequestColumn) -> tuple[pa.Array, str, Place]:
        """The raw values of a column, its name, and where each value stands."""
        raw = self.lists[column.name]
        if len(self.given_M) < len(raw):
            raw = raw.take(pa.array(self.given_M))
        return raw, f"history.{column.name}", lambda index: f"history.{column.name}[{self.given_M[index]}]"

    def typed(self, column: RequestColumn) -> pa.Array:
        """The values of a column."""
        return typed(column, *self.of(column), set())


def item_ids(words: Vocabulary, column: RequestColumn, raw: Any, name: str, place: Place) -> I32:
    """Dense ids of raw items, all of which are there; 0 for the unknown."""
    array = typed(column, raw, name, place, set())
    require_all(array, place)
    if column.read.kind == "integer" and not column.read.hashed:
        require_range(array, 2**63 - 1, place, "and raw ids are 0 or more")
    return words.items(array)


def place_of(name: str) -> Place:
    """Say where the values of a column of a history stand."""
    return lambda index: f"history.{name}[{index}]"


def _sortable(feature_M: NDArray[Any], raw: pa.Array, bags: RequestBags | None) -> NDArray[Any]:
    """What a feature sorts lines by: numbers as they were read, the missing ones first; sets by their ids; ids."""
    if pa.types.is_floating(raw.type):
        return np.nan_to_num(numbers_of(raw), nan=-np.inf)
    return feature_M if bags is None else bags.ranks(feature_M)


def _order(seconds_M: I64, item_M: I32, sort_by: Mapping[str, Sortable]) -> I64:
    """What sorts behaviours as lines are sorted: by time, dense id of the item, and features in the order of names."""
    order_M = np.argsort(seconds_M, kind="stable")
    sorted_M = seconds_M[order_M]
    if len(order_M) < 2 or (sorted_M[1:] != sorted_M[:-1]).all():
        return order_M
    # `lexsort` takes the main key last.
    return np.lexsort((*(sort_by[name]() for name in sorted(sort_by, reverse=True)), item_M, seconds_M))


def _value_of_user(column: RequestColumn, value: Any, counted: _Counted) -> pa.Array:
    """What belongs to the user, (1,): the one value that is given, or of one a behaviour the last by time."""
    name = f"history.{column.name}"
    if not _one_each(column, value):
        return typed(column, [value], name, lambda _: name, set())
    number = len(next(iter(counted.lists.values())))
    if len(value) != number:
        raise RequestError(f"{name} has {len(value):,} values for {number:,} behaviours; give one, or one for each")
    array = typed(column, value, name, place_of(column.name), set()).take(pa.array(counted.given_M))
    known_M = array.is_valid().to_numpy(zero_copy_only=False)
    if not known_M.any():
        return pa.nulls(1, array.type)
    last = counted.seconds_M[known_M].max()
    # Of equal times the largest.
    values = array.filter(pa.array(known_M & (counted.seconds_M == last))).to_pylist()
    return pa.array([max(values)], array.type)


def _one_each(column: RequestColumn, value: Any) -> bool:
    """Whether a list is one value a behaviour, and not one set of values."""
    if not column.read.several or column.read.separator is not None:
        return is_listed(value)
    if isinstance(value, pa.Array | pa.ChunkedArray):
        return bool(pa.types.is_nested(value.type))
    return is_listed(value) and any(is_listed(each) for each in value)
