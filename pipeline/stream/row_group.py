"""A row group of a shard as flat numpy arrays, checked.

U = users, M = behaviours of all users, T = targets of all users and splits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.errors import UserError

I64 = NDArray[np.int64]


@dataclass(frozen=True)
class RowGroup:
    """Columns of a row group, named as in ``history_schema`` without the prefix; they share Arrow's memory."""

    user_id_U: I64
    history_M: dict[str, NDArray[Any]]
    """item, category, timestamp; behavior and scene where the data have them."""
    history_offset_U: I64
    """(U + 1,): user u's behaviours are history_offset_U[u] .. history_offset_U[u + 1]."""
    target_T: dict[str, NDArray[Any]]
    """item, category, timestamp, label, split, history_end; scene where the data have it."""
    target_offset_U: I64
    """(U + 1,): user u's targets."""

    @classmethod
    def from_table(cls, table: pa.Table, largest_ids: Mapping[str, int]) -> Self:
        """Take a table of ``history_schema`` apart, without a copy.

        Args:
            table: the row group.
            largest_ids: of item, category; behavior and scene where the data have them.

        Raises:
            UserError: nulls, lists of a user that differ in length, ids or ``history_end`` out of range.
        """
        flat: dict[str, dict[str, NDArray[Any]]] = {"history": {}, "target": {}}
        offsets: dict[str, I64] = {}
        for name in table.column_names:
            if name == "user_id":
                continue
            # ``history_item`` is item of history; ``target_history_end`` is history_end of target.
            side, column = name.split("_", 1)
            offset_U, values = list_column(name, table[name])
            # All columns of a side have the same lists, so one array of offsets stands for all of them.
            if not np.array_equal(offsets.setdefault(side, offset_U), offset_U):
                raise UserError(f"column {name} has lists of other lengths than the columns beside it")
            largest = largest_ids.get(column)
            # Read without a sign, a negative id is larger than any: one pass over the values instead of two.
            if largest is not None and len(values) and values.view(np.uint32).max() > largest:
                raise UserError(
                    f"column {name} has ids from {values.min()} to {values.max()}, the manifest allows 0 to {largest}"
                )
            flat[side][column] = values
        group = cls(
            flat_column("user_id", table["user_id"]).to_numpy(),
            flat["history"],
            offsets["history"],
            flat["target"],
            offsets["target"],
        )
        end_T = group.target_T["history_end"]
        if np.any((end_T < 0) | (end_T > np.diff(group.history_offset_U)[group.user_T])):
            raise UserError("column target_history_end points outside of the user's history")
        return group

    @cached_property
    def user_T(self) -> I64:
        """The row of each target's user."""
        return np.repeat(np.arange(len(self.user_id_U)), np.diff(self.target_offset_U))


def list_column(name: str, column: pa.ChunkedArray) -> tuple[I64, NDArray[Any]]:
    """Offsets, from 0, and values of a list column.

    Raises:
        UserError: it has nulls.
    """
    array = flat_column(name, column)
    offset_U = array.offsets.to_numpy().astype(np.int64)
    # Arrow's ``values`` are those of the whole buffer, also where the array is a slice of it.
    values = array.values.slice(offset_U[0], offset_U[-1] - offset_U[0])
    if values.null_count:
        raise UserError(f"column {name} has nulls in its lists")
    return offset_U - offset_U[0], values.to_numpy()


def flat_column(name: str, column: pa.ChunkedArray) -> pa.Array:
    """A column as one array.

    Raises:
        UserError: it has nulls.
    """
    # A row group that is read alone comes as one chunk, which needs no copy.
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if array.null_count:
        raise UserError(f"column {name} has nulls")
    return array
