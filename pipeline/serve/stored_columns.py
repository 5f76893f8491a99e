"""Which columns of a log a store of histories has, and the values that it keeps of them.

Values stay raw, of the types that the settings of ``dare prepare`` say: an id that is text is kept as text, whoever
sent it as a number. What `pipeline.ingest.values` refuses is refused here.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from pipeline.ingest.columns import Column, event_columns, feature_column
from pipeline.ingest.conversion import converted, reads
from pipeline.ingest.sets import decoded_sets
from pipeline.ingest.times import LATEST, PER_SECOND
from pipeline.ingest.values import WrongValueError
from pipeline.serve.raw import Place, arrow_array, check_names, said
from schemas.errors import RequestError, UserError
from schemas.prepare import PrepareSettings, TimestampUnit
from schemas.settings import Settings
from schemas.shards import RawType

UserId = int | str
Value = int | float | str | list[int] | list[str] | None
"""A raw value; a list is that of a feature of several values, sorted, each once."""

Values = NDArray[Any] | list[Any]
"""Values of a column of some events; an array, where they are integers or numbers and none is missing."""

_YEAR = datetime(1970, 1, 1, tzinfo=UTC)


class StoredColumn(Settings):
    """A column whose values are kept."""

    name: str
    """Its name in histories."""
    kind: Literal["integer", "text", "number"]
    several: bool = False
    """Values are lists."""
    source: str | None = None
    """Its name in the log, or in the file that the feature has of its own, where that is another one."""
    file_feature: str | None = None
    """The feature with a file of its own that it is; None: it is in the log."""

    @property
    def column(self) -> Column:
        """How it is read of a log."""
        return Column(self.source or self.name, feature_column(self.name), self.kind, several=self.several)

    def values(self, converted: pa.Array) -> Values:
        """What is kept of a column that was read."""
        if self.kind != "text" and not self.several and not converted.null_count:
            numbers: NDArray[Any] = converted.to_numpy()
            return numbers
        kept: list[Any] = converted.to_pylist()
        if not self.several:
            return kept
        lists = decoded_sets(converted).to_pylist()
        if self.kind == "integer":
            lists = [[int(value) for value in each] for each in lists]
        # A place without a set is one with an empty list by now.
        return [None if text is None else each for text, each in zip(kept, lists, strict=True)]


class StoredColumns(Settings):
    """The columns of a store, by their names in the log of behaviours."""

    user: str
    user_type: RawType
    item: str
    timestamp: str
    timestamp_unit: TimestampUnit = "s"
    timestamp_zone: str | None = None
    behaviors: tuple[StoredColumn, ...]
    """What each event has beside its time: the item first, then the features of behaviours."""
    users: tuple[StoredColumn, ...] = ()
    """Features of users: one value each, the last one that is known."""
    keep: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Column -> values: only events with one of these values count, see ``events.keep``."""

    @classmethod
    def of_settings(cls, settings: PrepareSettings) -> Self:
        """The columns that ``dare prepare`` reads by these settings: of behaviours and users, not of items.

        Raises:
            UserError: a column has lists by one feature and single values by another one.
        """
        events = settings.events
        behaviors = {events.item_id: StoredColumn(name=events.item_id, kind=events.item_type)}
        users: dict[str, StoredColumn] = {}
        names = _sources(settings)
        for feature in settings.declared_features:
            source = feature.column
            # The user and the time are there anyway.
            if source is None or feature.of not in ("behavior", "user") or source in (events.user_id, events.timestamp):
                continue
            column = StoredColumn(
                name=f"user.{feature.name}" if feature.of == "user" and names[source] > 1 else source,
                # A text in which a separator stands between values stays one text.
                kind="text"
                if feature.separator is not None
                else "number"
                if feature.kind == "number"
                else feature.type,
                several=feature.kind == "ids" and feature.separator is None,
                source=source,
                file_feature=None if feature.file is None else feature.name,
            )
            into = behaviors if feature.of == "behavior" else users
            into[column.name] = _both(into.get(column.name, column), column)
        return cls(
            user=events.user_id,
            user_type=events.user_type,
            item=events.item_id,
            timestamp=events.timestamp,
            timestamp_unit=events.timestamp_unit,
            timestamp_zone=events.timestamp_zone,
            behaviors=tuple(behaviors.values()),
            users=tuple(users.values()),
            keep=events.keep,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all columns of a history, the time among them and the user not."""
        return (self.timestamp, *(column.name for column in (*self.behaviors, *self.users)))

    @property
    def source_columns(self) -> tuple[Column, ...]:
        """What is read of files of a log: the user as ``user``, the second as ``second``, all others by their names."""
        read = [
            Column(self.user, "user", self.user_type, "correct the file, or set events.user_type=text if ids are text"),
            Column(
                self.timestamp,
                "second",
                "time",
                "correct the file, or set events.timestamp_unit if times are of another kind",
            ),
        ]
        if self._per_second > 1:
            read.append(Column(self.timestamp, "moment", "integer"))
        return (*read, *(each.column for each in (*self.behaviors, *self.users) if each.file_feature is None))

    def user_id(self, raw: object) -> UserId:
        """The id of a user, which is of the type that the log has: a user 1 and a user "1" are not the same.

        Raises:
            RequestError: it is none.
        """
        number = raw.item() if isinstance(raw, np.integer) else raw
        kind = int if self.user_type == "integer" else str
        if not isinstance(number, kind) or isinstance(number, bool):
            raise RequestError(f"user is {said(raw)}; ids of users are {self.user_type}s here")
        return self.parse_user(number)

    def parse_user(self, raw: int | str) -> UserId:
        """The id of a user that somebody has typed.

        Raises:
            RequestError: it is none.
        """
        column = Column(self.user, "user", self.user_type)
        try:
            kept = converted(column, pa.array([raw]), self.timestamp_unit, None)[0][0].as_py()
        except WrongValueError as wrong:
            raise RequestError(f"user: {wrong}") from None
        except (pa.ArrowException, OverflowError):
            raise RequestError(f"user is {said(raw)}, no integer of 64 bits, or no text") from None
        if kept is None or (isinstance(kept, int) and kept < 0):
            raise RequestError(f"user is {said(raw)}; an id is a text that is not empty, or an integer of 0 or more")
        assert isinstance(kept, int | str)
        return kept

    def events(self, raw: Mapping[str, Any]) -> "Events":
        """Events of one user, as they are kept, of what a request has: lists of equal length; of the user, one value.

        The user's own column may be there as well and is not looked at. Columns of events must all be there, with None
        for what is unknown: an event of which a column was left out would be another one when it is sent again. What is
        known of the user may be left out.

        Raises:
            RequestError: a column that is missing or unknown, a value that no rule reads; names column and position.
        """
        listed = {*self._event_names}
        given = frozenset(raw)
        required = listed if given & listed else set()
        check_names("events", given, {self.user, *self.names, *self.keep}, required, {self.item, self.timestamp})
        behaviors: dict[str, list[Any]] = {}
        position: list[int] = []
        count = filtered = 0
        if required:
            lists = {name: _as_list(name, raw[name]) for name in self._event_names}
            count = len(lists[self.timestamp])
            for name, each in lists.items():
                if len(each) != count:
                    raise RequestError(
                        f"events.{name} has {len(each):,} values, events.{self.timestamp} has {count:,}; give each "
                        "event a value in both, null where one is missing"
                    )
            position = self._inside(lists, count)
            behaviors = {name: [each[index] for index in position] for name, each in lists.items()}
            filtered, count = count - len(position), len(position)
        moment = self._moments(behaviors.get(self.timestamp, []), position)
        kept: dict[str, Values] = {
            column.name: self._values(column, behaviors[column.name], _place(column.name, position))
            if column.name in behaviors
            else []
            for column in self.behaviors
        }
        for index, item in zip(position, as_list(kept[self.item]), strict=True):
            if item is None:
                raise RequestError(f"events.{self.item}[{index}] is missing; an event needs an item")
            if isinstance(item, int) and item < 0:
                raise RequestError(f"events.{self.item}[{index}] is {item}; ids are 0 or more")
        users = {}
        for column in self.users:
            if raw.get(column.name) is not None:
                if isinstance(raw[column.name], list | tuple) != column.several:
                    what = "a list of values" if column.several else "one value, not a list"
                    raise RequestError(f"events.{column.name} is of the user; give {what}")
                place = f"events.{column.name}"
                users[column.name] = as_list(self._values(column, [raw[column.name]], lambda _: place))[0]  # noqa: B023
        latest = int(self.seconds(moment).max()) if count else None
        of_user = {name: (latest, value) for name, value in users.items() if value is not None}
        return Events(moment, kept, of_user, filtered)

    def seconds(self, moment_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Whole seconds since 1970 of times as they are kept."""
        return moment_N if self._per_second == 1 else np.floor_divide(moment_N, self._per_second)

    def timestamps(self, moments: list[int]) -> list[Any]:
        """Raw timestamps that are read as these moments: numbers of the log's unit, or texts of ISO 8601 in UTC."""
        if self.timestamp_unit == "mmdd":
            days = [_YEAR + timedelta(seconds=moment) for moment in moments]
            return [day.month * 100 + day.day for day in days]
        if self.timestamp_unit == "datetime":
            return [(_YEAR + timedelta(seconds=moment)).strftime("%Y-%m-%dT%H:%M:%SZ").zfill(20) for moment in moments]
        return moments

    @property
    def _per_second(self) -> int:
        """Units in a second of the times that are kept: of dates, whole seconds are."""
        return PER_SECOND.get(self.timestamp_unit, 1)

    @property
    def _event_names(self) -> tuple[str, ...]:
        """Names of the columns of which each event has a value."""
        return tuple(dict.fromkeys([self.timestamp, *(column.name for column in self.behaviors), *self.keep]))

    def _inside(self, lists: Mapping[str, list[Any]], count: int) -> list[int]:
        """Positions of the events that have one of the values that count, in each column of ``keep``."""
        inside = list(range(count))
        for name, allowed in self.keep.items():
            texts = self._read(Column(name, name, "text"), lists[name], _place(name, range(count))).to_pylist()
            inside = [position for position in inside if texts[position] in allowed]
        return inside

    def _moments(self, raw: list[Any], position: Sequence[int]) -> NDArray[np.int64]:
        place = _place(self.timestamp, position)
        second, *others = (each for each in self.source_columns if each.source == self.timestamp)
        moments: list[Any] = self._read(second, raw, place).to_pylist()
        for index, moment in enumerate(moments):
            if moment is None:
                raise RequestError(f"{place(index)} is missing; an event needs a time")
            if not 0 <= moment <= LATEST:
                raise RequestError(
                    f"{place(index)} is {said(raw[index])}, a time before 1970 or after 9999; times are of the unit "
                    f"{self.timestamp_unit}"
                )
        # A part of a second is kept where the unit has one.
        for column in others:
            moments = self._read(column, raw, place).to_pylist()
        return np.array(moments, np.int64)

    def _values(self, column: StoredColumn, raw: list[Any], place: Place) -> Values:
        return column.values(self._read(column.column, raw, place))

    def _read(self, column: Column, raw: list[Any], place: Place) -> pa.Array:
        """Convert raw values, which stand at these places of the request."""
        array = arrow_array(raw, f"events.{column.source}", place)
        if not reads(column, array.type, self.timestamp_unit):
            kind = f"times of the unit {self.timestamp_unit}" if column.kind == "time" else f"{column.kind}s"
            index, first = next((index, value) for index, value in enumerate(raw) if value is not None)
            raise RequestError(f"{place(index)} is {said(first)}; {'lists of ' * column.several}{kind} are expected")
        try:
            return converted(column, array, self.timestamp_unit, self.timestamp_zone)[0]
        except WrongValueError as wrong:
            raise RequestError(f"{place(wrong.index)}: {wrong}") from None


@dataclass
class Events:
    """Events of one user in their order of arrival, as they are kept."""

    moment: NDArray[np.int64]
    """(E,) their times, in the log's unit; whole seconds where times are dates."""
    behaviors: Mapping[str, Values]
    """Column -> (E,) values."""
    user: Mapping[str, tuple[int | None, Value]] = field(default_factory=dict)
    """Column -> what is known of the user, and since which second; None: now."""
    filtered: int = 0
    """How many others have no value that counts; they are not among these."""

    def __len__(self) -> int:
        return len(self.moment)


def _sources(settings: PrepareSettings) -> Counter[str]:
    """How many things a name of a raw column stands for, users' features in the log being one; see `RequestColumns`."""
    of_users = {feature_column(each.name) for each in settings.declared_features if each.of == "user"}
    log = [column for column in event_columns(settings) if column.kind not in ("hour", "weekday")]
    files = [each for each in settings.declared_features if each.file is not None and each.of in ("user", "item")]
    return Counter(
        [
            *{column.source for column in log if column.name not in of_users}.union(settings.events.keep),
            *{column.source for column in log if column.name in of_users},
            *(each.column for each in files if each.column is not None),
        ]
    )


def _both(former: StoredColumn, column: StoredColumn) -> StoredColumn:
    """One column for two features of the same one: the kind that loses nothing that the other one needs."""
    if former.several != column.several:
        raise UserError(f"features: column {column.name} has lists by one feature and single values by another one")
    kinds = {former.kind, column.kind}
    kind = next(each for each in ("text", "integer", "number") if each in kinds)
    return column.model_copy(update={"kind": kind})


def _as_list(name: str, raw: object) -> list[Any]:
    if isinstance(raw, str | bytes | Mapping) or not hasattr(raw, "__iter__"):
        raise RequestError(f"events.{name} is {said(raw)}; give a list, with a value an event")
    return raw.tolist() if hasattr(raw, "tolist") else list(raw)


def _place(name: str, position: Sequence[int]) -> Place:
    """Say where in a request the values of a column stand."""
    return lambda index: f"events.{name}[{position[index]}]"


def as_list(values: Values) -> list[Any]:
    """Values of a column as Python has them."""
    return values.tolist() if isinstance(values, np.ndarray) else list(values)
