"""Sorted lines of whole users as arrays, and what follows from their order.

L = lines, U = users. Lines are ordered by (user, timestamp, item, ...): see ``definition.line_order``.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.hashing import hash_texts
from pipeline.ingest.definition import EVENT

I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Lines:
    """Lines of whole users. Optional columns are None where the data has none."""

    shard_L: NDArray[np.int32]
    user_id_L: pa.Array
    """Raw ids, int64 or string."""
    timestamp_L: I64
    item_L: NDArray[np.int32]
    label_L: NDArray[np.int8] | None
    """`EVENT` for an event, 0, 1 or `UNLABELED` for an impression; None: all lines are events."""
    split_L: NDArray[np.int8] | None
    line_L: I64 | None
    """Where an impression stands in its files, see `schemas.shards.RECORDS_OF_A_FILE`; -1 for an event."""
    others_L: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Further columns, called as in the engine: ``f_NAME`` of features (ids, or float64 numbers that are not finite
    where one is missing), ``label_NAME`` of further labels, ``weight``; ``u_NAME`` of users' features."""
    user_key_L: NDArray[np.int32] | None = None
    """What sorts users, see ``definition.in_shards``."""
    carried_L: NDArray[np.int8] | None = None
    """1 for behaviours of earlier days, which are there for what follows them; None: all lines are the day's own."""

    def __len__(self) -> int:
        return len(self.user_id_L)

    def slice(self, start: int, end: int) -> "Lines":
        """Lines start .. end; both must be borders of users."""
        parts: dict[str, Any] = {}
        for each in fields(self):
            values = getattr(self, each.name)
            parts[each.name] = None if values is None else _cut(values, start, end)
        return Lines(**parts)

    @cached_property
    def user_start_U(self) -> I64:
        """First line of each user."""
        return _user_starts(self.user_id_L)

    @cached_property
    def user_number_U(self) -> NDArray[Any]:
        """A number of each user for random draws: the raw id, or the hash of one that is text."""
        user_id_U = self.user_id_L.take(pa.array(self.user_start_U))
        return hash_texts(user_id_U) if user_id_U.type == pa.string() else user_id_U.to_numpy()

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
    def is_own_L(self) -> NDArray[np.bool_]:
        """The line is of this day."""
        return np.ones(len(self), bool) if self.carried_L is None else self.carried_L == 0

    @cached_property
    def own_behaviors_U(self) -> I64:
        """Number of behaviours of each user on this day."""
        if self.carried_L is None:
            return self.behaviors_U
        return np.bincount(self.user_L[self.is_event_L & self.is_own_L], minlength=len(self.user_start_U))

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
        users = batch["user_id"]
        last_start = int(_user_starts(users)[-1])
        if carried and carried[0]["user_id"][0].as_py() != users[0].as_py():
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


_OWN = {
    "shard": np.int32,
    "timestamp": np.int64,
    "item": np.int32,
    "label": np.int8,
    "split": np.int8,
    "line": np.int64,
    "user_key": np.int32,
    "carried": np.int8,
}
"""Columns that lines have names for. Engines widen small integers as they like."""


def _lines(batches: list[pa.RecordBatch]) -> Lines:
    table = pa.Table.from_batches(batches)
    own: dict[str, Any] = {
        f"{name}_L": table[name].to_numpy().astype(kind, copy=False) if name in table.column_names else None
        for name, kind in _OWN.items()
    }
    others = {name: table[name].to_numpy() for name in table.column_names if name not in _OWN and name != "user_id"}
    user_id_L = table["user_id"].combine_chunks()
    # Engines have several types of text.
    if not pa.types.is_integer(user_id_L.type):
        user_id_L = user_id_L.cast(pa.string())
    return Lines(**own, user_id_L=user_id_L, others_L=others)


def _cut(values: Any, start: int, end: int) -> Any:
    if isinstance(values, dict):
        return {name: each[start:end] for name, each in values.items()}
    return values[start:end]


def _user_starts(user_id_L: pa.Array) -> I64:
    """Where each run of equal neighbours begins."""
    new = np.empty(len(user_id_L), bool)
    new[:1] = True
    if pa.types.is_integer(user_id_L.type):
        values = user_id_L.to_numpy()
        new[1:] = values[1:] != values[:-1]
    else:
        new[1:] = pc.not_equal(user_id_L[1:], user_id_L[:-1]).to_numpy(zero_copy_only=False)
    return np.flatnonzero(new)
