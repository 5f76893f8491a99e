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

from pipeline.hashing import hash_texts
from schemas.errors import UserError

I64 = NDArray[np.int64]


class NoNegativeError(UserError):
    """There is nothing wrong with a row group, but it has a user for whom no negative can be drawn."""


@dataclass(frozen=True)
class RowGroup:
    """Columns of a row group, named as in ``shard_schema`` without the prefix; they share Arrow's memory."""

    user_id_U: I64
    """Raw ids; where these are text, numbers of the users in the data set."""
    user_text_U: pa.StringArray | None
    """Raw ids where these are text."""
    user_U: dict[str, NDArray[Any]]
    """Features of users."""
    history_M: dict[str, NDArray[Any]]
    """item, timestamp; features of behaviours, and in versions 1 and 2 the category."""
    history_offset_U: I64
    """(U + 1,): user u's behaviours are history_offset_U[u] .. history_offset_U[u + 1]."""
    target_T: dict[str, NDArray[Any]]
    """item, timestamp, label, split, history_end; further labels, weight and line where the data have them; features of
    impressions, those of behaviours that targets have too, and in versions 1 and 2 the category."""
    target_offset_U: I64
    """(U + 1,): user u's targets."""

    @classmethod
    def from_table(cls, table: pa.Table, largest_ids: Mapping[str, int], first_user: int = 0) -> Self:
        """Take a table of ``shard_schema`` apart, without a copy.

        Args:
            table: the row group.
            largest_ids: what `DataSet.largest_ids` says.
            first_user: number of the first user in the data set.

        Raises:
            UserError: nulls, lists of a user that differ in length, ids or ``history_end`` out of range, numbers that
                are not finite.
        """
        flat: dict[str, dict[str, NDArray[Any]]] = {"user": {}, "history": {}, "target": {}}
        offsets: dict[str, I64] = {}
        for name in table.column_names:
            if name == "user_id":
                continue
            # ``history_item`` is item of history; ``target_history_end`` is history_end of target.
            side, column = name.split("_", 1)
            if side == "user":
                values = flat_column(name, table[name]).to_numpy()
            else:
                offset_U, values = list_column(name, table[name])
                # All columns of a side have the same lists, so one array of offsets stands for all of them.
                if not np.array_equal(offsets.setdefault(side, offset_U), offset_U):
                    raise UserError(f"column {name} has lists of other lengths than the columns beside it")
            check_values(name, values, largest_ids.get(column))
            flat[side][column] = values
        user_id = flat_column("user_id", table["user_id"])
        text_U = user_id if pa.types.is_string(user_id.type) else None
        id_U = user_id.to_numpy() if text_U is None else np.arange(first_user, first_user + len(user_id))
        group = cls(id_U, text_U, flat["user"], flat["history"], offsets["history"], flat["target"], offsets["target"])
        end_T = group.target_T["history_end"]
        if np.any((end_T < 0) | (end_T > np.diff(group.history_offset_U)[group.user_T])):
            raise UserError("column target_history_end points outside of the user's history")
        weight_T = group.target_T.get("weight")
        if weight_T is not None and len(weight_T) and weight_T.min() < 0:
            raise UserError("column target_weight has weights below 0")
        return group

    @cached_property
    def user_T(self) -> I64:
        """The row of each target's user."""
        return np.repeat(np.arange(len(self.user_id_U)), np.diff(self.target_offset_U))

    @property
    def first_behavior_U(self) -> I64:
        """Seconds of each user's first behaviour; the largest int64 where there is none."""
        start_U, end_U = self.history_offset_U[:-1], self.history_offset_U[1:]
        first_U = np.full(len(start_U), np.iinfo(np.int64).max)
        first_U[end_U > start_U] = self.history_M["timestamp"][start_U[end_U > start_U]]
        return first_U

    @property
    def user_key_U(self) -> NDArray[Any]:
        """What is drawn by for each user: integers that depend on the raw id alone."""
        return user_keys(self.user_id_U if self.user_text_U is None else self.user_text_U)


def user_keys(user_id_U: NDArray[Any] | pa.Array) -> NDArray[Any]:
    """Integers to draw by, (U,): raw ids as they are, or hashes of texts, see `pipeline.hashing.hash_texts`."""
    if isinstance(user_id_U, np.ndarray):
        return user_id_U
    return hash_texts(user_id_U) if pa.types.is_string(user_id_U.type) else user_id_U.to_numpy()


def check_values(name: str, values: NDArray[Any], largest: int | None) -> None:
    """Make sure that a column holds ids from 0 to ``largest`` (None: it holds none), and that numbers are finite.

    Raises:
        UserError: it does not.
    """
    if not len(values):
        return
    # Read without a sign, a negative id is larger than any: one pass over the values instead of two.
    if largest is not None and values.view(np.uint32).max() > largest:
        raise UserError(
            f"column {name} has ids from {values.min()} to {values.max()}, the manifest allows 0 to {largest}"
        )
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UserError(f"column {name} has numbers that are not finite")


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
