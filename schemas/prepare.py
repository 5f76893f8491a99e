"""Settings of ``dare prepare``: where events come from, how targets are made of them, how shards are cut."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import ByteSize, Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from schemas.settings import Settings

TimestampUnit = Literal["s", "ms", "us", "datetime", "mmdd"]


class Log(Settings):
    """A log of lines in files. Every ``*_id`` and the like names a column of the files; None: the log has none."""

    files: tuple[str, ...] = Field(min_length=1)
    """Files or globs; CSV (also .gz, .zst) or Parquet, told by the ending."""
    header: bool = True
    """CSV files start with a line of column names."""
    file_columns: tuple[str, ...] | None = None
    """Names of a CSV's columns in order; required without a header."""
    delimiter: str = Field(",", min_length=1, max_length=1)
    user_id: str = "user_id"
    item_id: str = "item_id"
    category_id: str | None = "category_id"
    text_category: bool = False
    """Raw categories are text, not integers."""
    timestamp: str = "timestamp"
    timestamp_unit: TimestampUnit = "s"
    """Seconds, milliseconds or microseconds since 1970; date and time as text or Parquet timestamps; or MMDD days."""
    scene: str | None = None
    keep: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Column -> values: only lines with one of these values count."""

    @model_validator(mode="after")
    def _columns_are_named(self) -> Self:
        if not self.header and self.file_columns is None:
            raise ValueError("file_columns must name the columns of files that have no header")
        return self


class ItemFeatures(Settings):
    """Categories that stand in a file of their own, one line an item."""

    files: tuple[str, ...] = Field(min_length=1)
    item_id: str = "item_id"
    category_id: str = "category_id"


class Events(Log):
    """The log of behaviours."""

    behavior: str | None = None
    """Column of the behaviour type (click, cart, ...), if histories are to carry it."""
    item_features: ItemFeatures | None = None
    """Takes the place of ``category_id``."""


class Impressions(Log):
    """The log of what was shown, with a label 0 or 1."""

    label: str = "label"
    split: str | None = None
    """Column that says train, validation or test; without one, ``split`` of the settings cuts by time."""


class PaperSplit(Settings):
    """The paper's split of a user with T behaviours: test T, validation T-1, train T-2-5j."""

    kind: Literal["paper"] = "paper"
    min_behaviors: PositiveInt = 210
    """Users with fewer behaviours are left out."""
    min_history: PositiveInt = 1
    """A target needs this many strictly earlier behaviours."""
    train_targets: NonNegativeInt = 19
    train_stride: PositiveInt = 5
    negatives: NonNegativeInt = 2
    """Negatives of a positive, in proportion to frequency, never an item the user touched."""


class TimestampSplit(Settings):
    """Targets are lines of a user's last timestamps (baskets), a basket's lines all in one split."""

    kind: Literal["by_timestamp"] = "by_timestamp"
    min_behaviors: PositiveInt = 1
    """Users with fewer behaviours are left out."""
    min_history: PositiveInt = 200
    """A target needs this many strictly earlier behaviours; users without a target are left out."""
    test_groups: NonNegativeInt = 12
    """The last timestamps of a user, for test."""
    validation_groups: NonNegativeInt = 3
    """The timestamps before those, for validation; all earlier ones are for training."""
    targets_per_group: PositiveInt = 2
    negatives: NonNegativeInt = 2
    """Negatives of a positive, in proportion to frequency, never an item the user touched."""


class ImpressionSplit(Settings):
    """Targets are the impressions; without a column that says the split, the latest ones are held out."""

    kind: Literal["impressions"] = "impressions"
    min_behaviors: NonNegativeInt = 0
    """Users with fewer behaviours are left out."""
    min_history: NonNegativeInt = 1
    """A target needs this many strictly earlier behaviours."""
    test_fraction: float = Field(0.1, ge=0, lt=1)
    validation_fraction: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _something_to_train(self) -> Self:
        if self.test_fraction + self.validation_fraction >= 1:
            raise ValueError(
                "test_fraction and validation_fraction leave nothing to train on: their sum must be below 1"
            )
        return self


class ShardLayout(Settings):
    """How shards are cut."""

    behaviors_per_shard: PositiveInt = 4_000_000
    """Decides the number of shards: all events over this."""
    users_per_row_group: PositiveInt = 256
    """A row group is the unit of reading, shuffling and resuming."""


class PrepareSettings(Settings):
    """Everything that decides what ``dare prepare`` writes, and what it may use for it."""

    events: Events
    impressions: Impressions | None = None
    split: Annotated[PaperSplit | TimestampSplit | ImpressionSplit, Field(discriminator="kind")] = PaperSplit()
    shards: ShardLayout = ShardLayout()
    seed: NonNegativeInt = 0
    engine: Literal["duckdb", "spark"] = "duckdb"
    memory_limit: ByteSize = ByteSize(3 << 30)
    """Memory that the whole process keeps to with the embedded engine, e.g. 3GiB; more spills to the output's disk."""
    threads: PositiveInt | None = None
    """Threads of the engine; None: one for each core."""
    on_corrupt: Literal["fail", "skip"] = "fail"
    """A Parquet file that cannot be read: stop, or leave it out and report it."""

    @field_validator("memory_limit")
    @classmethod
    def _memory_is_enough(cls, limit: ByteSize) -> ByteSize:
        if limit < 1 << 30:
            raise ValueError("at least 1GiB is needed, written with its unit")
        return limit

    @model_validator(mode="after")
    def _split_fits_the_logs(self) -> Self:
        if (self.split.kind == "impressions") != (self.impressions is not None):
            raise ValueError("split.kind must be impressions where impressions are given, and only there")
        if self.impressions is not None and self.impressions.text_category != self.events.text_category:
            raise ValueError("impressions.text_category and events.text_category must agree")
        return self


PRESETS = {path.stem: path for path in sorted((Path(__file__).parent / "presets").glob("*.yaml"))}
"""Settings files of known logs, by name; ``generic`` holds nothing but the defaults."""
