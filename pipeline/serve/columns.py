"""What a request may say: raw columns of a history and of candidates, named as in the logs of ``dare prepare``."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, Self

from pipeline.ingest.columns import (
    USER_NUMBER,
    Column,
    event_columns,
    feature_column,
    file_columns,
    impression_columns,
)
from pipeline.ingest.recorded import settings_of
from pipeline.ingest.times import PER_SECOND
from schemas.prepare import PrepareSettings, TimestampUnit
from schemas.served import ServedData

Of = Literal["user", "behavior", "candidate"]
Role = Literal["user", "item", "timestamp", "feature", "filter"]

_ROLES: dict[str, Role] = {"user_id": "user", "item_id": "item", "timestamp": "timestamp"}


@dataclass(frozen=True)
class RequestColumn:
    """A raw column that a history or a candidate may have."""

    name: str
    """What requests call it: as the log does, or the file that a feature has of its own; ``user.FEATURE`` or
    ``item.FEATURE`` where a column of the log has that name and is something else."""
    of: Of
    """Whose it is: ``user`` has one value a request, ``behavior`` a list, ``candidate`` a value each."""
    role: Role
    """``filter``: only behaviours with some values of it count; see ``events.keep``."""
    required: bool
    """Requests without it are refused. What is not required is missing, or known of the item."""
    used: bool
    """Its values decide something; others may be there and are not looked at."""
    read: Column
    """How its values are read."""
    unit: TimestampUnit
    """The unit of its log's times."""
    zone: str | None
    """The zone of those of its log's times that carry none."""
    feature: str | None = None
    """The feature that it is; one column may be several features, each a `RequestColumn`."""

    @property
    def kind(self) -> str:
        """What its raw values are, in words."""
        if self.read.several:
            return "text" if self.read.separator is not None else f"list of {self.read.kind}"
        return self.read.kind


@dataclass(frozen=True)
class RequestColumns:
    """Columns of histories and of candidates."""

    settings: PrepareSettings
    """What the data set was prepared with."""
    history: tuple[RequestColumn, ...]
    candidate: tuple[RequestColumn, ...]

    @classmethod
    def of(cls, data: ServedData) -> Self:
        """Say what requests may have for a model whose data set is ``data``."""
        settings = settings_of(data.settings, data.labels)
        side = {record.name: record.of for record in data.features}
        on_targets = {record.name for record in data.features if record.target or record.of == "item"}

        def of_behaviors(name: str, column: Column) -> RequestColumn:
            feature = _feature_of(column)
            role = _ROLES.get(column.name, "filter" if feature is None else "feature")
            whose = None if feature is None else side[feature]
            return RequestColumn(
                name,
                "user" if "user" in (whose, role) else "behavior",
                role,
                required=role in ("item", "timestamp", "filter") or (whose == "behavior" and feature in data.read),
                # All features of behaviours decide which one comes first where times and items are equal.
                used=role != "user" and (feature is None or whose == "behavior" or feature in data.read),
                read=column,
                unit=settings.events.timestamp_unit,
                zone=settings.events.timestamp_zone,
                feature=feature,
            )

        def of_candidates(name: str, column: Column) -> RequestColumn:
            log, feature = settings.impressions or settings.events, _feature_of(column)
            return RequestColumn(
                name,
                "candidate",
                _ROLES.get(column.name, "feature"),
                required=feature is None or (feature in data.read and side[feature] != "item"),
                used=feature is None or feature in data.read,
                read=column,
                unit=log.timestamp_unit,
                zone=log.timestamp_zone,
                feature=feature,
            )

        events = [column for column in event_columns(settings) if column.name != USER_NUMBER]
        shown = events if settings.impressions is None else impression_columns(settings)
        shown = [
            column for column in shown if column.name in ("item_id", "timestamp") or _feature_of(column) in on_targets
        ]
        filters = [Column(source, f"keep {source}", "text") for source in settings.events.keep]
        history = _named([*events, *filters], _of_files(settings, "user", "item"), side)
        candidate = _named(shown, _of_files(settings, "item"), side)
        return cls(
            settings,
            tuple(of_behaviors(name, column) for name, column in history),
            tuple(of_candidates(name, column) for name, column in candidate),
        )


def made_up_request(columns: RequestColumns) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A history of one behaviour and one later candidate, both of an item that is unknown; features are missing."""

    def value(column: RequestColumn, day: int) -> Any:
        match column.role:
            case "timestamp":
                return _day(day, column.unit)
            case "item":
                return 0 if column.read.kind == "integer" else "0"
            case "filter":
                return columns.settings.events.keep[column.read.source][0]
        return None

    history = {
        column.name: [value(column, 1)] for column in columns.history if column.required and column.of == "behavior"
    }
    return history, [{column.name: value(column, 2) for column in columns.candidate if column.required}]


def _day(day: int, unit: TimestampUnit) -> int | str:
    """A day of January as a log of this unit writes it: of a late year, for early behaviours may not count."""
    if unit == "mmdd":
        return 100 + day
    moment = datetime(2100, 1, day, tzinfo=UTC)
    if unit == "datetime":
        return moment.strftime("%Y-%m-%d %H:%M:%S")
    return int(moment.timestamp()) * PER_SECOND[unit]


def _of_files(settings: PrepareSettings, *sides: str) -> list[Column]:
    """Columns of the features of some sides that have files of their own."""
    features = [each for each in settings.declared_features if each.file is not None and each.of in sides]
    return [file_columns(settings, (feature,))[1] for feature in features]


def _named(log: Sequence[Column], files: Sequence[Column], side: Mapping[str, str]) -> Iterator[tuple[str, Column]]:
    """Name the columns of a log and of files of features, all but the hours and weekdays that are made of times."""

    def of_user(column: Column) -> bool:
        return side.get(_feature_of(column) or "") == "user"

    log = [column for column in log if column.kind not in ("hour", "weekday")]
    # What belongs to the user is one value, where other columns are lists.
    names = Counter(
        [
            *{column.source for column in log if not of_user(column)},
            *{column.source for column in log if of_user(column)},
            *(column.source for column in files),
        ]
    )
    for number, column in enumerate([*log, *files]):
        apart = number >= len(log) or of_user(column)
        feature = _feature_of(column)
        yield f"{side[feature]}.{feature}" if feature and apart and names[column.source] > 1 else column.source, column


def _feature_of(column: Column) -> str | None:
    """The feature that a column is; None: it is none."""
    prefix = feature_column("")
    return column.name.removeprefix(prefix) if column.name.startswith(prefix) else None
