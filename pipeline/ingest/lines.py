"""Sorted lines of whole users as arrays, and what follows from their order.

L = lines, U = users. Lines are ordered by (user, timestamp, item, ...): see ``definition.line_order``.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.ingest.definition import EVENT

I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Lines:
    """Lines of whole users. Optional columns are None where the data has none."""

    shard_L: NDArray[np.int32]
    user_id_L: I64
    timestamp_L: I64
    item_L: NDArray[np.int32]
    behavior_L: NDArray[np.int32] | None
    scene_L: NDArray[np.int32] | None
    label_L: NDArray[np.int8] | None
    """`EVENT` for an event, 0, 1 or `UNLABELED` for an impression; None: all lines are events."""
    split_L: NDArray[np.int8] | None
    line_L: I64 | None
    """Where an impression stands in its files, see `schemas.shards.RECORDS_OF_A_FILE`; -1 for an event."""

    def __len__(self) -> int:
        return len(self.user_id_L)

    def slice(self, start: int, end: int) -> "Lines":
        """Lines start .. end; both must be borders of users."""
        parts: dict[str, Any] = {}
        for field in fields(self):
            values = getattr(self, field.name)
            parts[field.name] = None if values is None else values[start:end]
        return Lines(**parts)

    @cached_property
    def user_start_U(self) -> I64:
        """First line of each user."""
        return _run_starts(self.user_id_L)

    @cached_property
    def user_L(self) -> I64:
        """User of each line, counted from 0."""
        return np.repeat(np.arange(len(self.user_start_U)), np.diff(self.user_start_U, append=len(self)))

    @cached_property
    def group_start_L(self) -> I64:
        """First line of the same user with the same timestamp."""
        new = np.empty(len(self), bool)
        new[:1] = True
        new[1:] = (self.timestamp_L[1:] != self.timestamp_L[:-1]) | (self.user_L[1:] != self.user_L[:-1])
        starts = np.flatnonzero(new)
        return np.repeat(starts, np.diff(starts, append=len(self)))

    @cached_property
    def is_event_L(self) -> NDArray[np.bool_]:
        """The line is a behaviour, not an impression."""
        return np.ones(len(self), bool) if self.label_L is None else self.label_L == EVENT

    @cached_property
    def events_before_L(self) -> I64:
        """Behaviours of all users before each line; one entry more, for the end."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.is_event_L)])

    @cached_property
    def history_end_L(self) -> I64:
        """Behaviours of the same user strictly earlier than the line's timestamp: equal timestamps never leak."""
        # Counted over all lines, less what belongs to the users before: no loop over users.
        before_user_U = self.events_before_L[self.user_start_U]
        end_L: I64 = self.events_before_L[self.group_start_L] - before_user_U[self.user_L]
        return end_L

    @cached_property
    def behaviors_U(self) -> I64:
        """Number of behaviours of each user."""
        count_U: I64 = np.diff(self.events_before_L[np.append(self.user_start_U, len(self))])
        return count_U


def whole_users(batches: Iterable[pa.RecordBatch]) -> Iterator[Lines]:
    """Cut a stream of sorted record batches between users; a user larger than a batch is put together."""
    carried: list[pa.RecordBatch] = []
    for batch in batches:
        if not len(batch):
            continue
        users = batch["user_id"].to_numpy()
        last_start = int(_run_starts(users)[-1])
        if carried and carried[0]["user_id"][0].as_py() != users[0]:
            # The carried user ends with the last batch, and so does every user but the last of this one.
            yield _lines([*carried, batch.slice(0, last_start)])
            carried = [batch.slice(last_start)]
        elif last_start == 0:
            # The whole batch is of one user, who may go on in the next one.
            carried.append(batch)
        else:
            yield _lines([*carried, batch.slice(0, last_start)])
            carried = [batch.slice(last_start)]
    if carried:
        yield _lines(carried)


def _lines(batches: list[pa.RecordBatch]) -> Lines:
    table = pa.Table.from_batches(batches)

    def column(name: str, kind: type[np.integer]) -> Any:
        # Engines widen small integers as they like.
        return table[name].to_numpy().astype(kind, copy=False) if name in table.column_names else None

    return Lines(
        shard_L=column("shard", np.int32),
        user_id_L=column("user_id", np.int64),
        timestamp_L=column("timestamp", np.int64),
        item_L=column("item", np.int32),
        behavior_L=column("behavior", np.int32),
        scene_L=column("scene", np.int32),
        label_L=column("label", np.int8),
        split_L=column("split", np.int8),
        line_L=column("line", np.int64),
    )


def _run_starts(values: NDArray[Any]) -> I64:
    """Where each run of equal neighbours begins."""
    new = np.empty(len(values), bool)
    new[:1] = True
    new[1:] = values[1:] != values[:-1]
    return np.flatnonzero(new)
