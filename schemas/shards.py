"""Arrow schema of user-history shards: one row is one user, the history stored once, the targets pointing into it."""

from enum import IntEnum

import pyarrow as pa

SCHEMA_VERSION = 2
"""Version of the shard layout that is written. 2 added ``target_line`` and targets without a label."""
READABLE_VERSIONS = (1, 2)
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


def _ragged(name: str, value: pa.DataType) -> pa.Field:
    # A user's lists have no holes, and neither do their values: what is unknown is the id 0.
    return pa.field(name, pa.list_(pa.field("element", value, nullable=False)), nullable=False)


def history_schema(*, behavior: bool, scene: bool, line: bool = False) -> pa.Schema:
    """Schema of a shard. Ids are dense (0 = unknown), timestamps are seconds.

    ``history_*`` lists are ordered by (timestamp, item id); a target's history is the part before
    ``target_history_end``, the number of behaviours strictly earlier than the target.
    ``target_*`` lists are ordered by (timestamp, history position), a positive before its negatives.

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


def dictionary_schema(*, text: bool, of_items: bool = False) -> pa.Schema:
    """Schema of a dictionary: raw id, dense id (>= 1, in a shuffled order), frequency among the events.

    Args:
        text: raw ids are text, not integers.
        of_items: the dictionary of items; carries the item's dense category as well.
    """
    fields = [
        pa.field("raw_id", pa.string() if text else pa.int64(), nullable=False),
        pa.field("id", pa.int32(), nullable=False),
        pa.field("frequency", pa.int64(), nullable=False),
    ]
    if of_items:
        fields.append(pa.field("category", pa.int32(), nullable=False))
    return pa.schema(fields)
