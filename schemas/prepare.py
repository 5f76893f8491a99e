"""Settings of ``dare prepare``: where events come from, how targets are made of them, how shards are cut."""

import re
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zoneinfo import available_timezones

from pydantic import (
    BeforeValidator,
    ByteSize,
    Field,
    field_validator,
    model_validator,
)

from schemas.features import BESIDE, UNCHANGED, FeatureFile, FeatureName, FeatureSettings, Rows
from schemas.settings import Seed, Settings
from schemas.shards import RawType
from schemas.text_format import TextFormat

TimestampUnit = Literal["s", "ms", "us", "datetime", "mmdd"]


def _moment(value: Any) -> Any:
    if isinstance(value, datetime | date):  # what YAML takes an unquoted date for
        value = value.isoformat()
    if isinstance(value, bool) or re.fullmatch("(?:19|20)[0-9]{6}", str(value)):
        raise ValueError("seconds since 1970, or a date? write dates with dashes, such as 2017-12-03")
    if not isinstance(value, str) or re.fullmatch("-?[0-9]+", value):
        return value
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError("a moment is seconds since 1970, or ISO 8601 such as 2017-12-03T00:00:00+08:00") from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


Moment = Annotated[int, BeforeValidator(_moment), Field(ge=-62_135_596_800, le=253_402_387_199)]
"""Seconds since 1970, from the year 1 to 9999; as ISO 8601 without an offset it is UTC."""


Count = Annotated[int, Field(ge=0, le=1_000_000)]
"""How many behaviours, targets or groups a rule takes of a user."""
Stride = Annotated[int, Field(gt=0, le=1_000_000)]
Negatives = Annotated[int, Field(ge=0, le=10_000)]


class Log(TextFormat):
    """A log of lines in files. Every ``*_id`` and the like names a column of the files; None: the log has none."""

    files: tuple[str, ...] = Field(min_length=1)
    """Files, folders of files, or patterns; CSV (.csv, .tsv, .txt, also .gz, .zst) or Parquet, told by the ending."""
    user_id: str = "user_id"
    user_type: RawType = "integer"
    """What raw user ids are; text: uuids, names, any characters as they stand."""
    item_id: str = "item_id"
    item_type: RawType = "integer"
    """What raw item ids are."""
    category_id: str | None = "category_id"
    """Short for a feature ``{name: category, of: item, column: category_id}``."""
    text_category: bool = False
    """Raw categories are text, not integers."""
    timestamp: str = "timestamp"
    timestamp_unit: TimestampUnit = "s"
    """Seconds, milliseconds or microseconds since 1970; date and time as text or Parquet timestamps; or MMDD days."""
    timestamp_zone: str | None = None
    """Zone of dates and times that carry no offset: an IANA name, or an offset such as +08:00. None: UTC."""
    since: Moment | None = None
    """Earlier lines are left out, and counted."""
    until: Moment | None = None
    """Lines at this moment and later are left out, and counted."""
    scene: str | None = None
    keep: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Column -> values: only lines with one of these values count."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.since is not None and self.until is not None and self.since >= self.until:
            raise ValueError(f"since ({self.since}) must be earlier than until ({self.until})")
        return self

    @field_validator("timestamp_zone")
    @classmethod
    def _zone_is_known(cls, zone: str | None) -> str | None:
        if zone is None or re.fullmatch("[+-](?:0[0-9]|1[0-4]):?(?:[0-5][0-9])", zone):
            return zone
        # Beside these there are names of this machine's own zone, and ones whose clocks count leap seconds.
        if zone not in available_timezones() - {"Factory", "localtime"}:
            raise ValueError("an IANA name such as Asia/Shanghai, or an offset such as +08:00")
        return zone


class ItemFeatures(TextFormat):
    """Categories that stand in a file of their own, one line an item."""

    files: tuple[str, ...] = Field(min_length=1)
    item_id: str = "item_id"
    category_id: str = "category_id"


class Events(Log):
    """The log of behaviours."""

    behavior: str | None = None
    """Column of the behaviour type (click, cart, ...), if histories are to carry it."""
    item_features: ItemFeatures | None = None
    """Says the categories of both logs. ``category_id`` is null where a log has no such column."""


class Impressions(Log):
    """The log of what was shown, with a label 0 or 1."""

    label: str | None = "label"
    """None (``null``): there is none; all impressions are for test, to be scored."""
    labels: dict[FeatureName, str] | None = Field(None, min_length=1, max_length=32)
    """Name -> column, where there are several labels; the first is the main one. It takes the place of ``label``."""
    weight: str | None = None
    """Column of the targets' weights, 0 or more."""
    split: str | None = None
    """Column that says train, validation or test; without one, ``split`` of the settings cuts by time."""

    @property
    def named_labels(self) -> dict[str, str]:
        """Name -> column of the labels, the main one first; empty: there are none."""
        single = {} if self.label is None else {"label": self.label}
        return self.labels or single


class Eviction(Settings):
    """Which items lose their row in the table when a day is added; it is given to others. Their features stay known."""

    unseen_days: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Items that no event and no impression of the last so many days has; None: however long ago it was."""
    rows: Rows | None = None
    """At most so many items have a row; None: as many as are admitted."""
    by: Literal["recency", "frequency"] = "recency"
    """Where there are more: those seen longest ago, or the rarest, lose theirs."""


class Items(Settings):
    """How items are numbered."""

    min_count: Annotated[int, Field(ge=1, le=10**12)] = 1
    """Items with fewer events have no row of their own: they are unknown, and their features are known."""
    hash_buckets: Rows | None = None
    """Hash items into so many ids, without a dictionary; None: number them."""
    evict: Eviction = Eviction()

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.hash_buckets is not None and self.min_count > 1:
            raise ValueError("min_count needs a dictionary; hash_buckets has none")
        if self.hash_buckets is not None and self.evict != Eviction():
            raise ValueError("evict needs a dictionary; hash_buckets has none, and buckets are never full")
        return self


class Histories(Settings):
    """What later days go on from, see ``dare prepare --extend``."""

    keep: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """The last so many behaviours of every user are kept for the days that follow, beside the shards; None: none are,
    and no day can follow."""


class PaperSplit(Settings):
    """The paper's split of a user with T behaviours: test T, validation T-1, train T-2-5j."""

    kind: Literal["paper"] = "paper"
    min_behaviors: Stride = 210
    """Users with fewer behaviours are left out."""
    min_history: Count = 1
    """A target needs this many strictly earlier behaviours."""
    train_targets: Count = 19
    train_stride: Stride = 5
    negatives: Negatives = 2
    """Negatives of a positive, in proportion to frequency, never an item the user touched."""


class TimestampSplit(Settings):
    """Targets are lines of a user's last timestamps (baskets), a basket's lines all in one split."""

    kind: Literal["by_timestamp"] = "by_timestamp"
    min_behaviors: Stride = 1
    """Users with fewer behaviours are left out."""
    min_history: Count = 200
    """A target needs this many strictly earlier behaviours; users without a target are left out."""
    test_groups: Count = 12
    """The last timestamps of a user, for test."""
    validation_groups: Count = 3
    """The timestamps before those, for validation; all earlier ones are for training."""
    targets_per_group: Stride = 2
    negatives: Negatives = 2
    """Negatives of a positive, in proportion to frequency, never an item the user touched."""


class ImpressionSplit(Settings):
    """Targets are the impressions; without a column that says the split, the latest ones are held out."""

    kind: Literal["impressions"] = "impressions"
    min_behaviors: Count = 0
    """Users with fewer behaviours are left out."""
    min_history: Count = 1
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


class DateSplit(Settings):
    """Everything before a moment is for training, for all users alike; then comes validation, then test.

    With impressions, these are the targets. Without, targets are the last behaviours of a user in each period.
    """

    kind: Literal["by_date"] = "by_date"
    validation_from: Moment
    test_from: Moment
    min_behaviors: Count = 1
    """Users with fewer behaviours are left out."""
    min_history: Count = 1
    """A target needs this many strictly earlier behaviours."""
    train_targets: Count = 19
    """At most so many behaviours of a user before ``validation_from``, counted back from the last one."""
    train_stride: Stride = 5
    """Every so many behaviours one is a target."""
    validation_targets: Count = 1
    """The last behaviours of a user in the time of validation."""
    test_targets: Count = 1
    """The last behaviours of a user in the time of the test."""
    negatives: Negatives = 2
    """Negatives of a positive, in proportion to frequency, never an item the user touched; none for impressions."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.validation_from >= self.test_from:
            raise ValueError(
                f"validation_from ({self.validation_from}) must be earlier than test_from ({self.test_from})"
            )
        return self


SplitSettings = PaperSplit | TimestampSplit | ImpressionSplit | DateSplit


class ShardLayout(Settings):
    """How shards are cut."""

    behaviors_per_shard: Annotated[int, Field(gt=0, le=10**12)] = 4_000_000
    """Decides the number of shards: all events over this."""
    users_per_row_group: Annotated[int, Field(gt=0, le=1_000_000)] = 256
    """A row group is the unit of reading, shuffling and resuming."""


class PrepareSettings(Settings):
    """Everything that decides what ``dare prepare`` writes, and what it may use for it."""

    events: Events
    impressions: Impressions | None = None
    items: Items = Items()
    history: Histories = Histories()
    features: tuple[FeatureSettings, ...] = Field((), max_length=200)
    """What describes items, behaviours, users and impressions, beside the short forms of the logs."""
    split: Annotated[SplitSettings, Field(discriminator="kind")] = PaperSplit()
    shards: ShardLayout = ShardLayout()
    seed: Seed = 0
    engine: Literal["duckdb", "spark"] = "duckdb"
    memory_limit: ByteSize = ByteSize(3 << 30)
    """Memory that the whole process keeps to with the embedded engine, e.g. 3GiB; more spills to the output's disk."""
    threads: Annotated[int, Field(gt=0, le=1024)] | None = None
    """Threads of the engine; None: one for each core."""
    on_corrupt: Literal["fail", "skip"] = "fail"
    """A Parquet file that cannot be read: stop, or leave it out and report it."""

    @field_validator("memory_limit")
    @classmethod
    def _memory_is_enough(cls, limit: ByteSize) -> ByteSize:
        if limit < 1 << 30:
            raise ValueError("at least 1GiB is needed, written with its unit")
        return limit

    @property
    def declared_features(self) -> tuple[FeatureSettings, ...]:
        """All features, the logs' short forms among them, in the order of their names."""
        declared = self._short_forms() | {feature.name: feature for feature in self.features}
        return tuple(declared[name] for name in sorted(declared))

    def _short_forms(self) -> dict[str, FeatureSettings]:
        events, shown = self.events, self.impressions
        short = {}
        raw: RawType = "text" if events.text_category else "integer"
        if events.item_features is not None:
            # Files of their own, whose format `events.item_features` says.
            files = events.item_features
            short["category"] = FeatureSettings(
                name="category",
                of="item",
                column=files.category_id,
                type=raw,
                file=FeatureFile(path=files.files[0], **files.model_dump(include=set(TextFormat.model_fields))),
                key=files.item_id,
            )
        elif events.category_id is not None:
            short["category"] = FeatureSettings(name="category", of="item", column=events.category_id, type=raw)
        if events.behavior is not None:
            short["behavior"] = FeatureSettings(name="behavior", of="behavior", column=events.behavior)
        if events.scene is not None:
            known = events.scene if shown is None else shown.scene
            short["scene"] = FeatureSettings(name="scene", of="behavior", column=events.scene, impression_column=known)
        return short

    @property
    def labels(self) -> dict[str, str]:
        """Name -> column of the impressions' labels, the main one first; empty: there are none."""
        return {} if self.impressions is None else self.impressions.named_labels

    @property
    def without_events(self) -> bool:
        """There are impressions alone, to be scored with the histories that a chain of days has already."""
        return self.events.files == (UNCHANGED,)

    @property
    def weighted(self) -> bool:
        """Targets have weights."""
        return self.impressions is not None and self.impressions.weight is not None

    def is_short_form(self, feature: FeatureSettings) -> bool:
        """Whether a feature is declared by the logs' settings (``category_id``, ``scene``, ...) alone."""
        return feature not in self.features and feature.name in self._short_forms()

    def files_of(self, feature: FeatureSettings) -> tuple[str, ...]:
        """Files, folders or patterns that a feature has of its own."""
        assert feature.file is not None
        own = self.events.item_features
        if own is not None and self.is_short_form(feature):
            return own.files
        path = feature.file.path
        if path.startswith(BESIDE):
            # The options of a URL stand behind it.
            first, mark, options = self.events.files[0].partition("?")
            path = f"{first.rpartition('/')[0] or '.'}/{path.removeprefix(BESIDE)}{mark}{options}"
        return (path,)

    @model_validator(mode="after")
    def _features_fit(self) -> Self:
        names = [feature.name for feature in self.features]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"features: two are called {name}")
        short = self._short_forms()
        for number, feature in enumerate(self.features):
            where = f"features.{number} ({feature.name})"
            # The default of category_id is no declaration: one that somebody wrote is.
            written = feature.name != "category" or "category_id" in self.events.model_fields_set
            if feature.name in short and written:
                raise ValueError(f"{where}: the events name it too; declare it once")
            if feature.name == "category" and feature.of != "item":
                raise ValueError(f"{where}: category is the name of what items have; choose another one")
            if feature.time is not None and self.events.timestamp_unit == "mmdd":
                raise ValueError(f"{where}.time: timestamp_unit=mmdd has neither hours nor days of a week")
            if feature.of == "impression" and self.impressions is None:
                raise ValueError(f"{where}: there are no impressions")
            if self.impressions is None and feature.impression_column not in (None, feature.column):
                raise ValueError(
                    f"{where}.impression_column: there are no impressions; it can only be {feature.column}"
                )
        return self

    @model_validator(mode="after")
    def _days_can_follow(self) -> Self:
        if self.items.evict != Eviction() and self.history.keep is None:
            raise ValueError("items.evict is for days that follow each other; set history.keep too")
        for key in ("min_history", "min_behaviors"):
            least = getattr(self.split, key)
            if self.history.keep is not None and self.history.keep < least:
                raise ValueError(
                    f"history.keep={self.history.keep} is less than split.{key}={least}: on later days nobody would "
                    "have so many behaviours; keep more"
                )
        return self

    @model_validator(mode="after")
    def _moments_fit_days_without_a_year(self) -> Self:
        if self.events.timestamp_unit == "mmdd":
            moments = [self.events.since, self.events.until]
            if self.split.kind == "by_date":
                moments += [self.split.validation_from, self.split.test_from]
            if any(moment is not None and not 0 <= moment <= 366 * 86_400 for moment in moments):
                raise ValueError(
                    "timestamp_unit=mmdd has no year: its days are those of 1970, so write moments as 1970-11-11"
                )
        return self

    @model_validator(mode="after")
    def _split_fits_the_logs(self) -> Self:
        if self.impressions is None:
            if self.split.kind == "impressions":
                raise ValueError("split.kind=impressions needs impressions")
            return self
        if self.split.kind not in ("impressions", "by_date"):
            raise ValueError("split.kind must be impressions or by_date where impressions are given")
        if self.impressions.split is not None and self.split.kind == "by_date":
            raise ValueError("impressions.split names a column and split.kind=by_date dates; set one of them")
        if self.impressions.labels is not None and "label" in self.impressions.model_fields_set:
            raise ValueError(
                "impressions.label and impressions.labels are both set; labels alone says all of them (impressions "
                "without any label: both null)"
            )
        if not self.labels and self.impressions.split is not None:
            raise ValueError("impressions without a label are all for test; leave impressions.split out")
        if (self.impressions.timestamp_unit == "mmdd") != (self.events.timestamp_unit == "mmdd"):
            raise ValueError("timestamp_unit=mmdd has no year: both logs must have it, or neither")
        for key in ("text_category", "user_type", "item_type"):
            if getattr(self.impressions, key) != getattr(self.events, key):
                raise ValueError(f"impressions.{key} and events.{key} must agree")
        return self


PRESETS = {path.stem: path for path in sorted((Path(__file__).parent / "presets").glob("*.yaml"))}
"""Settings files of known logs, by name; ``generic`` holds nothing but the defaults."""
