"""How columns of a log are declared as features of items, behaviours, users and impressions."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from schemas.settings import Settings
from schemas.shards import Kind, RawType, Side
from schemas.text_format import TextFormat

RESERVED = frozenset(
    {"item", "position", "interval", "timestamp", "label", "weight", "split", "history_end", "line", "id"}
)
"""Names that columns of a shard, or features that every data set has, have already."""

FeatureName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]

Rows = Annotated[int, Field(ge=1, le=2**31 - 2)]


BESIDE = "beside:"
"""Begins the path of what lies in the folder of the first file of the events."""


UNCHANGED = "unchanged:"
"""The path of a file that a day of a chain does not have: items and users are what the days before say."""


class FeatureFile(TextFormat):
    """What belongs to items or users, a line each."""

    path: str
    """Files, a folder or a pattern; ``beside:NAME`` is in the folder of the events' first file; ``unchanged:``, on a
    day of a chain: there is none, and nothing new."""


def _path_alone(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class FeatureSettings(Settings):
    """A column of a log, or of a file beside it, that describes items, behaviours, users or impressions."""

    name: FeatureName
    of: Side
    """``item`` and ``user`` come from the log, where the last value by time counts, or from ``file``."""
    kind: Kind = "id"
    column: str | None = None
    """Column of the log, or of ``file``."""
    time: Literal["hour", "weekday"] | None = None
    """In the place of a column: what a clock in the log's ``timestamp_zone`` shows at the line's time, the hour 0 .. 23
    or the day of the week, 0 (Monday) .. 6. Targets have it too."""
    type: RawType = "text"
    """What the raw values are, for ``id`` and ``ids``."""
    file: Annotated[FeatureFile, BeforeValidator(_path_alone)] | None = None
    """One line an item or user, as a path or with how it is written; None: the column is in the log."""
    key: str | None = None
    """Column of the file with the raw id of the item or user; None: named as in the events."""
    separator: Annotated[str, Field(min_length=1, max_length=16)] | None = None
    """What stands between the values of ``ids`` that are written as one text; None: the column holds lists."""
    buckets: Annotated[int, Field(ge=2, le=65_536)] | None = None
    """A number becomes the id of one of so many quantiles."""
    scale: Literal["log", "standard"] | None = None
    """A number stays one: ``standard`` takes the mean away and divides by the standard deviation, ``log`` does so with
    log(1 + x). What is missing becomes 0, the mean."""
    hash_buckets: Rows | None = None
    """Hash raw values into so many ids, without a dictionary; None: number them."""
    min_count: Annotated[int, Field(ge=1, le=10**12)] = 1
    """Raw values that are seen less often are unknown."""
    impression_column: str | None = None
    """Column of the impressions in which targets have a behaviour's feature too. With targets that are cut from events
    it must equal ``column``: a target then has the value of its own event, so it must be known before the event."""

    @field_validator("name")
    @classmethod
    def _name_is_free(cls, name: str) -> str:
        if name in RESERVED or name.startswith("label_"):
            raise ValueError(
                f"a name that is used already; choose another than {', '.join(sorted(RESERVED))}, label_..."
            )
        return name

    @model_validator(mode="before")
    @classmethod
    def _hours_are_integers(cls, values: Any) -> Any:
        is_time = isinstance(values, dict) and values.get("time") is not None
        return {"type": "integer", **values} if is_time else values

    @model_validator(mode="after")
    def _comes_from_one_place(self) -> Self:
        if (self.column is None) == (self.time is None):
            raise ValueError("give a column or a time (hour, weekday), one of them")
        if self.time is not None:
            if self.of not in ("behavior", "impression"):
                raise ValueError("time is of behavior or of impression: items and users have none")
            if (self.kind, self.type, self.impression_column) != ("id", "integer", None):
                raise ValueError("time is an integer of kind id, which targets have anyway")
        return self

    @property
    def on_targets(self) -> bool:
        """Whether targets have it too, though it is of behaviours."""
        return self.of == "behavior" and (self.impression_column is not None or self.time is not None)

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if self.kind == "number":
            if (self.buckets is None) == (self.scale is None):
                raise ValueError("a number needs buckets or scale, one of them")
            for key in ("hash_buckets", "separator"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} is for ids, not for a number")
            if self.min_count > 1:
                raise ValueError("min_count is for ids, not for a number")
        elif self.buckets is not None or self.scale is not None:
            raise ValueError("buckets and scale are for a number: set kind=number")
        if self.kind == "id" and self.separator is not None:
            raise ValueError("separator is for several values: set kind=ids")
        if self.hash_buckets is not None and self.min_count > 1:
            raise ValueError("min_count needs a dictionary; hash_buckets has none")
        return self

    @model_validator(mode="after")
    def _fits_its_side(self) -> Self:
        if self.file is not None and self.of not in ("item", "user"):
            raise ValueError("a file of its own has the features of items or users")
        if self.key is not None and self.file is None:
            raise ValueError("key names a column of file, and file is not set")
        if self.impression_column is not None and self.of != "behavior":
            raise ValueError("impression_column is for features of behaviours")
        return self
