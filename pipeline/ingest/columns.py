"""Which columns of the files are read, as what: the settings of ``dare prepare`` said for each log.

A feature's column is called ``f_NAME`` from here on, whatever its name in the files, and has the type that its raw
values come in: int64 or text for ids, one text for a set (see `pipeline.ingest.sets`), int64 for hashes, float64 for
numbers.
"""

from dataclasses import dataclass

import pyarrow as pa

from pipeline.ingest.values import Kind
from schemas.features import FeatureSettings
from schemas.prepare import Events, Impressions, Log, PrepareSettings
from schemas.shards import RawType, Side

USER_NUMBER = "user_number"
"""Column of the hashes of user ids that are text: what orders users."""
FEATURE_KEY = "key"
"""Column of the raw ids in a file of features."""

_TYPES: dict[Kind, pa.DataType] = {
    "integer": pa.int64(),
    "text": pa.string(),
    "number": pa.float64(),
    "time": pa.int64(),
    "hour": pa.int64(),
    "weekday": pa.int64(),
    "label": pa.int8(),
    "split": pa.string(),
}


@dataclass(frozen=True)
class Column:
    """A column of the files that is read."""

    source: str
    """Its name in the files."""
    name: str
    """Its name from here on."""
    kind: Kind
    remedy: str = "correct the file"
    """What to do about a value that no rule reads, for messages."""
    several: bool = False
    """Places have sets of values of the kind."""
    separator: str | None = None
    """What stands between the values of a set that is one text; None: the column has lists."""
    hashed: bool = False
    """Hashes take the place of values, see `pipeline.hashing.hash_values`."""
    negative: bool = True
    """Numbers below 0 are right."""
    optional: bool = False
    """Files may lack it, all of them together."""

    @property
    def type(self) -> pa.DataType:
        """Arrow type of what is made of it."""
        if self.several:
            return pa.string()
        return pa.int64() if self.hashed else _TYPES[self.kind]

    @property
    def coded(self) -> bool:
        """Codes can take the place of its texts, see `pipeline.ingest.text_codes`."""
        return self.type == pa.string() and self.kind != "split"


def feature_column(name: str) -> str:
    """Name of a feature's column while a data set is prepared."""
    return f"f_{name}"


def feature_type(feature: FeatureSettings) -> pa.DataType:
    """Arrow type of a feature's column while a data set is prepared."""
    if feature.kind == "number":
        return _TYPES["number"]
    column = Column("", "", feature.type, several=feature.kind == "ids", hashed=feature.hash_buckets is not None)
    return column.type


def user_column(name: str) -> str:
    """Name on lines of what belongs to the line's user."""
    return f"u_{name}"


def label_column(number: int, name: str) -> str:
    """Name of a label's column while a data set is prepared; that of the main one, number 0, is the same always."""
    return f"label_{name}" if number else "label"


def id_columns(log: Log, *, hashed_items: bool = False) -> tuple[Column, ...]:
    """User, item and time of each line."""
    times = f"correct the file, or set {_role(log)}.timestamp_unit if times are of another kind"
    columns: tuple[Column, ...] = (
        Column(log.user_id, "user_id", log.user_type, _or_text("user_type", _role(log), log.user_type)),
        Column(
            log.item_id,
            "item_id",
            log.item_type,
            _or_text("item_type", _role(log), log.item_type),
            hashed=hashed_items,
        ),
        Column(log.timestamp, "timestamp", "time", times),
    )
    if log.user_type == "text":
        columns += (Column(log.user_id, USER_NUMBER, "text", hashed=True),)
    return columns


def event_columns(settings: PrepareSettings) -> tuple[Column, ...]:
    """What is read of the log of behaviours."""
    features = [
        _feature(each, each.column or settings.events.timestamp, "events", settings)
        for each in settings.declared_features
        if each.file is None and each.of != "impression"
    ]
    return (*_ids(settings, settings.events), *features)


def impression_columns(settings: PrepareSettings) -> tuple[Column, ...]:
    """What is read of the log of impressions."""
    log = settings.impressions
    assert log is not None
    columns = list(_ids(settings, log))
    for each in settings.declared_features:
        source: str | None = None
        if each.of == "impression":
            source = each.column or log.timestamp
        elif each.of == "behavior":
            source = log.timestamp if each.time is not None else each.impression_column
        elif each.file is None:
            # Their values may stand in this log too; that of the short form under a name of its own.
            short = settings.is_short_form(each)
            source = log.category_id if short else _column(each)
            if source is not None and not short:
                columns.append(_feature(each, source, "impressions", settings, optional=True))
                continue
        if source is not None:
            columns.append(_feature(each, source, "impressions", settings))
    # What is scored alone need not say what became of it.
    optional = settings.without_events
    for number, (name, source) in enumerate(settings.labels.items()):
        columns.append(Column(source, label_column(number, name), "label", optional=optional))
    if log.weight is not None:
        remedy = "weights are 0 or more; correct the file"
        columns.append(Column(log.weight, "weight", "number", remedy, negative=False, optional=optional))
    if log.split is not None and not settings.without_events:
        columns.append(Column(log.split, "split", "split"))
    return tuple(columns)


def file_columns(settings: PrepareSettings, features: tuple[FeatureSettings, ...]) -> tuple[Column, ...]:
    """What is read of a file of features, all of one side: ids under the name `FEATURE_KEY`, and the features."""
    side: Side = features[0].of
    hashed = side == "item" and settings.items.hash_buckets is not None
    source, kind = key_of(settings, features[0])
    role = roles(side)
    key = Column(source, FEATURE_KEY, kind, _or_text(f"{side}_type", "events", kind), hashed=hashed)
    return (key, *(_feature(each, _column(each), role, settings) for each in features))


def key_of(settings: PrepareSettings, feature: FeatureSettings) -> tuple[str, RawType]:
    """Column of a feature's own file that has raw ids, and what they are."""
    events = settings.events
    if feature.of == "user":
        return feature.key or events.user_id, events.user_type
    return feature.key or events.item_id, events.item_type


def roles(side: Side) -> str:
    """What a file of features is about, for messages: items or users."""
    return f"{side}s"


def _ids(settings: PrepareSettings, log: Log) -> tuple[Column, ...]:
    return id_columns(log, hashed_items=settings.items.hash_buckets is not None)


def _feature(
    feature: FeatureSettings, source: str, role: str, settings: PrepareSettings, *, optional: bool = False
) -> Column:
    name = feature_column(feature.name)
    if feature.time is not None:
        return Column(source, name, feature.time)
    if feature.kind == "number":
        logarithm = feature.scale == "log"
        remedy = "scale=log is for numbers of 0 or more; correct the file" if logarithm else "correct the file"
        return Column(source, name, "number", remedy, negative=not logarithm, optional=optional)
    remedy = "correct the file"
    if feature.type == "integer":
        how = f"declare the feature {feature.name} with type=text if its values are text"
        if settings.is_short_form(feature):
            how = f"set {'events' if role == 'items' else role}.text_category=true if categories are text"
        remedy = f"correct the file, or {how}"
    return Column(
        source,
        name,
        feature.type,
        remedy,
        several=feature.kind == "ids",
        separator=feature.separator,
        hashed=feature.hash_buckets is not None,
        optional=optional,
    )


def _column(feature: FeatureSettings) -> str:
    assert feature.column is not None, "items and users have no time of their own"
    return feature.column


def _role(log: Log) -> str:
    return "events" if isinstance(log, Events) else "impressions" if isinstance(log, Impressions) else "items"


def _or_text(setting: str, role: str, kind: RawType) -> str:
    return "correct the file" if kind == "text" else f"correct the file, or set {role}.{setting}=text if ids are text"
