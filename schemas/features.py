"""How columns of a log are declared as features of items, behaviours, users and impressions."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from schemas.settings import Settings
from schemas.shards import Kind, RawType, Side

RESERVED = frozenset(
    {"item", "position", "interval", "timestamp", "label", "weight", "split", "history_end", "line", "id"}
)
"""Names that columns of a shard, or features that every data set has, have already."""

FeatureName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]

Rows = Annotated[int, Field(ge=1, le=2**31 - 2)]


class FeatureSettings(Settings):
    """A column of a log, or of a file beside it, that describes items, behaviours, users or impressions."""

    name: FeatureName
    of: Side
    """``item`` and ``user`` come from the log, where the last value by time counts, or from ``file``."""
    kind: Kind = "id"
    column: str
    type: RawType = "text"
    """What the raw values are, for ``id`` and ``ids``."""
    file: str | None = None
    """Files, a folder or a pattern, one line an item or user; None: the column is in the log."""
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
