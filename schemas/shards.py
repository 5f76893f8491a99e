"""Arrow schema of user-history shards, and the record of each feature in them.

One row is one user, the history stored once, the targets pointing into it.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 4
"""Version of the shard layout that is written. 2 added ``target_line`` and targets without a label; 3 has features of
any kind, and what belongs to items in a file of its own; 4 has days that follow each other."""
READABLE_VERSIONS = (1, 2, 3, 4)
"""Versions that are read; every other one is refused by name."""

UNLABELED = -1
"""The label of a target that is there to be scored alone."""
RECORDS_OF_A_FILE = 1 << 40
"""``target_line`` is the number of the impression's file times this, plus the number of its record there, from 1."""


class Split(IntEnum):
    """What a target is for; the value is the code in the column ``target_split``."""

    TRAIN = 0
    VALIDATION = 1
    TEST = 2


SPLITS = tuple(split.name.lower() for split in Split)


Side = Literal["item", "behavior", "user", "impression"]
"""What a feature belongs to: an item, whoever meets it; a behaviour; a user; or what was shown."""

Kind = Literal["id", "ids", "number"]
"""One raw value, several raw values, or a number."""

RawType = Literal["integer", "text"]
"""What raw ids are. Text is every kind of text, and whatever else is written down as text: see docs/data.md."""

Encoding = Literal["dictionary", "hash", "buckets", "scale"]
"""How raw values become what a model sees: numbered in a dictionary, hashed into buckets, cut into quantiles, or
scaled, in which case they stay numbers."""


class FeatureRecord(BaseModel):
    """What a manifest says of a feature."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    of: Side
    kind: Kind
    encoding: Encoding
    type: RawType | None = None
    """What the raw values are; None for numbers."""
    rows: int
    """The largest id; 0 for numbers that stay numbers."""
    bags: int | None = None
    """For ``ids``: how many different sets of values there are; the largest number of one."""
    target: bool = False
    """Whether targets carry it too: every feature of impressions, and those of behaviours that are known beforehand."""
    values: int = 0
    """Places that could have a value: items, users, events, or impressions and events."""
    missing: int = 0
    """Those without one."""
    below_min_count: int = 0
    """Those whose value is rarer than ``min_count``, so that it is unknown."""
    rare: int = 0
    """Raw values that are rarer than ``min_count``."""
    changed: int = 0
    """Items or users whose value changes in time, or in their file; the last one counts."""
    collisions: int | None = None
    """For hashed values: how many more raw values there are than buckets that have any."""
    edges: tuple[float, ...] | None = None
    """For quantiles: the least value of each bucket but the first."""
    mean: float | None = None
    """Mean of scaled numbers, after the logarithm where there is one."""
    deviation: float | None = None
    """Their standard deviation; 1 where all are equal."""
    scale: Literal["log", "standard"] | None = None

    @property
    def dictionary(self) -> str | None:
        """Name of the file that numbers its raw values, schema `dictionary_schema`; None: there is none."""
        return f"feature-{self.name}.parquet" if self.encoding == "dictionary" else None

    @property
    def bag_file(self) -> str | None:
        """Name of the file of its sets of ids; None: it has one value."""
        return f"bags-{self.name}.arrow" if self.kind == "ids" else None

    @property
    def is_number(self) -> bool:
        """Whether the model sees a float, not an id."""
        return self.encoding == "scale"


ITEM_FEATURES = "item_features.arrow"
"""Name of the file of what belongs to items: Arrow IPC, a column a feature, row i for the item of dense id i. Where
items have places of their own in the table (`Manifest.placed_items`), the column `ITEM_PLACE` says them."""
ITEM_PLACE = "item"
"""Column of `ITEM_FEATURES`, int32: places in the item table. 0 is that of the unknown, which rare and evicted items
share. No feature can have the name."""


def _ragged(name: str, value: pa.DataType) -> pa.Field:
    # A user's lists have no holes, and neither do their values: what is unknown is the id 0.
    return pa.field(name, pa.list_(pa.field("element", value, nullable=False)), nullable=False)


def value_type(feature: FeatureRecord) -> pa.DataType:
    """Type of a feature's values in a data set: float32 for numbers that stay numbers, int32 for ids and bags."""
    return pa.float32() if feature.is_number else pa.int32()


def raw_type(type: RawType) -> pa.DataType:
    """Type of raw ids in a data set: int64 or text."""
    return pa.string() if type == "text" else pa.int64()


def shard_schema(
    features: Sequence[FeatureRecord], *, user_type: RawType, labels: Sequence[str], weighted: bool, line: bool
) -> pa.Schema:
    """Schema of a shard of version 3. Ids are dense (0 = unknown), timestamps are seconds.

    ``history_*`` lists are ordered by (timestamp, item id); a target's history is the part before
    ``target_history_end``, the number of behaviours strictly earlier than the target.
    ``target_*`` lists are ordered by (timestamp, history position), a positive before its negatives.
    What belongs to an item stands in `ITEM_FEATURES` alone.

    Args:
        features: of the data set.
        user_type: of raw user ids.
        labels: of the targets; the first one is ``target_label``, the others ``target_label_NAME``.
        weighted: targets have weights.
        line: targets say which line of the impressions they are, see `RECORDS_OF_A_FILE`.
    """
    fields = [pa.field("user_id", raw_type(user_type), nullable=False)]
    fields += [
        pa.field(f"user_{each.name}", value_type(each), nullable=False) for each in features if each.of == "user"
    ]
    fields += [_ragged("history_item", pa.int32()), _ragged("history_timestamp", pa.int64())]
    fields += [_ragged(f"history_{each.name}", value_type(each)) for each in features if each.of == "behavior"]
    fields += [_ragged("target_item", pa.int32()), _ragged("target_timestamp", pa.int64())]
    fields += [_ragged(label_column(labels, label), pa.int8()) for label in labels]
    if weighted:
        fields.append(_ragged("target_weight", pa.float32()))
    fields += [_ragged("target_split", pa.int8()), _ragged("target_history_end", pa.int32())]
    fields += [
        _ragged(f"target_{each.name}", value_type(each))
        for each in features
        if each.of in ("impression", "behavior") and each.target
    ]
    if line:
        fields.append(_ragged("target_line", pa.int64()))
    return pa.schema(fields)


def layer_schema(features: Sequence[FeatureRecord], *, user_type: RawType) -> pa.Schema:
    """Schema of a file of histories, ``history-*.arrow``, which later days of a chain go on from. One row is one user.

    Rows are ordered by (``key``, ``user_id``). Values are those that shards are made of: ids that never change, and
    numbers as they were read (float64, minus infinity where one is missing), which are cut or scaled for each day.

    Args:
        features: of the data set; those of behaviours and of users are in it.
        user_type: of raw user ids.
    """

    def kept(feature: FeatureRecord) -> pa.DataType:
        return pa.float64() if feature.kind == "number" else pa.int32()

    return pa.schema(
        [
            pa.field("user_id", raw_type(user_type), nullable=False),
            pa.field("key", pa.int32(), nullable=False),
            pa.field("crc32", pa.uint32(), nullable=False),
            *(pa.field(f"user_{each.name}", kept(each), nullable=False) for each in features if each.of == "user"),
            _ragged("history_item", pa.int32()),
            _ragged("history_timestamp", pa.int64()),
            *(_ragged(f"history_{each.name}", kept(each)) for each in features if each.of == "behavior"),
        ]
    )


def label_column(labels: Sequence[str], label: str) -> str:
    """Name of a label's column: the first label's is the same whatever its name."""
    return "target_label" if label == labels[0] else f"target_label_{label}"


def history_schema(*, behavior: bool, scene: bool, line: bool = False) -> pa.Schema:
    """Schema of a shard of versions 1 and 2, in which each behaviour and target has its item's category.

    Args:
        behavior: the history carries behaviour types.
        scene: history and targets carry scenes.
        line: targets say which line of the impressions they are, see `RECORDS_OF_A_FILE`.
    """
    fields = [
        pa.field("user_id", pa.int64(), nullable=False),
        _ragged("history_item", pa.int32()),
        _ragged("history_category", pa.int32()),
        _ragged("history_timestamp", pa.int64()),
    ]
    if behavior:
        fields.append(_ragged("history_behavior", pa.int32()))
    if scene:
        fields.append(_ragged("history_scene", pa.int32()))
    fields += [
        _ragged("target_item", pa.int32()),
        _ragged("target_category", pa.int32()),
        _ragged("target_timestamp", pa.int64()),
        _ragged("target_label", pa.int8()),
        _ragged("target_split", pa.int8()),
        _ragged("target_history_end", pa.int32()),
    ]
    if scene:
        fields.append(_ragged("target_scene", pa.int32()))
    if line:
        fields.append(_ragged("target_line", pa.int64()))
    return pa.schema(fields)


BAGS = pa.schema([_ragged("ids", pa.int32())])
"""Schema of the file of a feature's sets: row b has the sorted ids of bag b; row 0 is empty."""

ROW_GROUPS = pa.schema(
    [
        pa.field("file", pa.int32(), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("users", pa.int64(), nullable=False),
        pa.field("behaviors", pa.int64(), nullable=False),
        *(pa.field(split, pa.int64(), nullable=False) for split in SPLITS),
    ]
)
"""Schema of ``row_groups.parquet``: what each row group holds, so that an epoch is planned without reading a shard.

``file`` counts the manifest's shards from 0; ``train``, ``validation`` and ``test`` are numbers of targets.
"""


def dictionary_schema(*, text: bool, of_items: bool = False, hashed: bool = False, of_days: bool = False) -> pa.Schema:
    """Schema of a dictionary: raw id, dense id (>= 1, in a shuffled order), frequency among the events.

    In a chain of days ids never change; a feature's value that is not admitted yet has the id 0, and is counted on.

    Args:
        text: raw ids are text, not integers.
        of_items: the dictionary of items of versions 1 and 2; carries the item's dense category as well.
        hashed: raw ids are not known, all of them are null; ids are buckets of hashes.
        of_days: the dictionary of items of a chain of days. ``last_seen`` is the time of the last event or impression
            of the item; ``row`` its row in the item table (`schemas.row_layout.RowLayout`), 0 where it has none;
            ``row_day`` the day of the chain on which it got that row, from 0.
    """
    fields = [
        pa.field("raw_id", pa.string() if text else pa.int64(), nullable=hashed),
        pa.field("id", pa.int32(), nullable=False),
        pa.field("frequency", pa.int64(), nullable=False),
    ]
    if of_items:
        fields.append(pa.field("category", pa.int32(), nullable=False))
    if of_days:
        fields += [
            pa.field("last_seen", pa.int64(), nullable=False),
            pa.field("row", pa.int32(), nullable=False),
            pa.field("row_day", pa.int32(), nullable=False),
        ]
    return pa.schema(fields)
