"""Arrow schemas of what comes in: behaviour events and, where a log has them, impressions."""

import pyarrow as pa

UNKNOWN = 0
"""Dense id of everything that is unknown, missing or padding. Row 0 of every embedding table."""


def event_schema(*, text_category: bool, behavior: bool, scene: bool) -> pa.Schema:
    """Schema of normalised events, in any order; ``timestamp`` in seconds.

    Args:
        text_category: raw categories are text, not integers.
        behavior: events carry a behaviour type (click, cart, ...).
        scene: events carry a scene (where the behaviour took place).
    """
    fields = [
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("category_id", pa.string() if text_category else pa.int64()),
        pa.field("timestamp", pa.int64(), nullable=False),
    ]
    if behavior:
        fields.append(pa.field("behavior", pa.string()))
    if scene:
        fields.append(pa.field("scene", pa.string()))
    return pa.schema(fields)


def impression_schema(*, text_category: bool, scene: bool, label: bool, split: bool) -> pa.Schema:
    """Schema of normalised impressions: what was shown to a user, and whether it was clicked (``label`` 0 or 1).

    ``line`` says where an impression stands in its files, see `schemas.shards.RECORDS_OF_A_FILE`.

    Args:
        text_category: raw categories are text, not integers.
        scene: impressions carry a scene.
        label: impressions carry a label.
        split: impressions carry a split (``train``, ``validation`` or ``test``).
    """
    fields = list(event_schema(text_category=text_category, behavior=False, scene=scene))
    fields.append(pa.field("line", pa.int64(), nullable=False))
    if label:
        fields.append(pa.field("label", pa.int8(), nullable=False))
    if split:
        fields.append(pa.field("split", pa.string(), nullable=False))
    return pa.schema(fields)
