"""Files of histories, from which later days of a chain go on: written in order, read for the users who are wanted.

Whoever reads verifies what he reads, and nothing else: each user has a checksum, and so have the keys of a record
batch, by which users are found.

U = users, B = behaviours of all of them, R = runs: a user's behaviours in one file, K = wanted users.
"""

import mmap
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.ingest.columns import feature_column, user_column
from pipeline.ingest.definition import NO_NUMBER
from pipeline.ingest.lines import I64, Lines
from schemas.errors import UserError
from schemas.manifest import REMEDY

BATCH = 1 << 20
"""Behaviours of a record batch, about: offsets of lists are 32-bit, and what is merged is held batch by batch."""
_ROW = 4
"""What a user without behaviours counts for among them."""
_KEYS = b"key_crc32"
_ITEM, _TIMESTAMP = "history_item", "history_timestamp"


@dataclass(frozen=True)
class Histories:
    """Behaviours of users, those of a user together and in time order; columns are called as in `layer_schema`."""

    user_id_U: pa.Array
    key_U: NDArray[np.int32]
    length_U: I64
    users: dict[str, NDArray[Any]]
    """(U,) each: what belongs to users."""
    behaviors: dict[str, NDArray[Any]]
    """(B,) each."""

    def __len__(self) -> int:
        return len(self.key_U)

    def slice(self, start: int, end: int) -> "Histories":
        """Users start .. end."""
        first, last = int(self.length_U[:start].sum()), int(self.length_U[:end].sum())
        return Histories(
            self.user_id_U[start:end],
            self.key_U[start:end],
            self.length_U[start:end],
            {name: values[start:end] for name, values in self.users.items()},
            {name: values[first:last] for name, values in self.behaviors.items()},
        )

    def where(self, wanted_U: NDArray[np.bool_]) -> "Histories":
        """Some of the users."""
        if wanted_U.all():
            return self
        wanted_B = np.repeat(wanted_U, self.length_U)
        return Histories(
            self.user_id_U.filter(pa.array(wanted_U)),
            self.key_U[wanted_U],
            self.length_U[wanted_U],
            {name: values[wanted_U] for name, values in self.users.items()},
            {name: values[wanted_B] for name, values in self.behaviors.items()},
        )

    def checksums(self) -> NDArray[np.uint32]:
        """(U,) CRC-32 of all that is known of each user."""
        if not len(self):
            return np.zeros(0, np.uint32)
        fixed = [self.key_U, self.length_U, *self.users.values()]
        user_id = self.user_id_U
        if pa.types.is_integer(user_id.type):
            fixed.append(user_id.to_numpy())
            text, text_end = memoryview(b""), np.zeros(len(self), np.int64)
        else:
            # From the first one on, wherever the array begins in its buffers.
            text = memoryview("".join(user_id.to_pylist()).encode())
            text_end = np.cumsum(pc.binary_length(user_id).to_numpy())
        as_bytes = [np.ascontiguousarray(each).view(np.uint8).reshape(len(self), -1) for each in fixed]
        rows = np.concatenate(as_bytes, axis=1).reshape(-1).data
        width = sum(each.shape[1] for each in as_bytes)
        end_U = np.cumsum(self.length_U)
        columns = [(rows, width * np.arange(len(self)), width * np.arange(1, len(self) + 1))]
        columns.append((text, np.concatenate([[0], text_end[:-1]]), text_end))
        for values in self.behaviors.values():
            content = np.ascontiguousarray(values).view(np.uint8).data
            columns.append((content, (end_U - self.length_U) * values.itemsize, end_U * values.itemsize))
        crc = [0] * len(self)
        for content, start, end in columns:
            bounds = zip(start.tolist(), end.tolist(), strict=True)
            crc = [zlib.crc32(content[a:b], before) for before, (a, b) in zip(crc, bounds, strict=True)]
        return np.array(crc, np.uint32)


def own_histories(lines: Lines, schema: pa.Schema, keep: int) -> Histories:
    """The last ``keep`` behaviours of each user among a day's own lines; users of whom nothing is known are left out.

    Args:
        lines: of whole users.
        schema: `schemas.shards.layer_schema`.
        keep: behaviours of a user.
    """
    assert lines.user_key_L is not None, "the engine's lines have it"
    line_B = np.flatnonzero(lines.is_event_L & lines.is_own_L)
    count_U = lines.own_behaviors_U
    # How far each is from the user's last one.
    back_B = np.cumsum(count_U)[lines.user_L[line_B]] - np.arange(len(line_B))
    line_B = line_B[back_B <= keep]
    start_U = lines.user_start_U
    users = {}
    known_U = count_U > 0
    for name in _names(schema, "user_"):
        values = lines.others_L[user_column(name.removeprefix("user_"))][start_U]
        users[name] = values.astype(schema.field(name).type.to_pandas_dtype(), copy=False)
        known_U |= users[name] != _unknown(users[name])
    behaviors: dict[str, NDArray[Any]] = {_ITEM: lines.item_L[line_B], _TIMESTAMP: lines.timestamp_L[line_B]}
    for name in _names(schema, "history_")[2:]:
        values = lines.others_L[feature_column(name.removeprefix("history_"))][line_B]
        behaviors[name] = values.astype(schema.field(name).type.value_type.to_pandas_dtype(), copy=False)
    return Histories(
        lines.user_id_L.take(pa.array(start_U[known_U])),
        lines.user_key_L[start_U[known_U]],
        np.minimum(count_U, keep)[known_U],
        {name: values[known_U] for name, values in users.items()},
        behaviors,
    )


def together(parts: Sequence[Histories], keep: int) -> Histories:
    """Histories of the users of all parts, by (key, user id): the last ``keep`` behaviours, the newest known values.

    Args:
        parts: the oldest first; what one has of a user is later than what those before it have.
        keep: behaviours of a user.
    """
    user_id_R = pa.concat_arrays([part.user_id_U for part in parts])
    key_R = np.concatenate([part.key_U for part in parts])
    length_R = np.concatenate([part.length_U for part in parts])
    start_R = np.cumsum(length_R) - length_R
    part_R = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    # Ids in the order of their values: of users whose keys are equal, the ids decide.
    distinct = user_id_R.dictionary_encode()
    rank = np.empty(len(distinct.dictionary), np.int64)
    rank[pc.sort_indices(distinct.dictionary).to_numpy()] = np.arange(len(rank))
    rank_R = rank[distinct.indices.to_numpy()]
    order = np.lexsort((part_R, rank_R, key_R))
    rank_R, key_R, start_R, length_R = rank_R[order], key_R[order], start_R[order], length_R[order]
    new_R = np.ones(len(order), bool)
    new_R[1:] = rank_R[1:] != rank_R[:-1]
    user_R = np.cumsum(new_R) - 1
    first_U = np.flatnonzero(new_R)
    # From each run the end is taken, as far as the later runs of the user leave room.
    end_U = np.cumsum(length_R)[np.append(first_U[1:], len(order)) - 1] if len(order) else np.zeros(0, np.int64)
    later_R = end_U[user_R] - np.cumsum(length_R)
    taken_R = np.clip(keep - later_R, 0, length_R)
    index_B = ranges(start_R + length_R - taken_R, taken_R)
    users = {}
    for name in parts[0].users:
        value_R = np.concatenate([part.users[name] for part in parts])[order]
        users[name] = value_R[first_U]
        known_R = value_R != _unknown(value_R)
        # numpy assigns in order: the last known run of a user stays.
        users[name][user_R[known_R]] = value_R[known_R]
    return Histories(
        user_id_R.take(pa.array(order[first_U])),
        key_R[first_U],
        np.bincount(user_R, taken_R, len(first_U)).astype(np.int64),
        users,
        {name: np.concatenate([part.behaviors[name] for part in parts])[index_B] for name in parts[0].behaviors},
    )


class HistoryWriter:
    """Writes a file of histories, in record batches that do not depend on how the histories come in.

    Where no user comes, there is no file.

    Args:
        path: of the file.
        schema: `schemas.shards.layer_schema`.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema = path, schema
        self._held: list[Histories] = []
        self.users, self.behaviors = 0, 0
        """Written so far, and held."""
        self._weight = 0
        self._writer: pa.RecordBatchFileWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        try:
            if kind is None:
                self._write(rest=True)
        finally:
            if self._writer is not None:
                self._writer.close()

    def add(self, histories: Histories) -> None:
        """Write users, who come after those that were written."""
        self._held.append(histories)
        self.users += len(histories)
        self.behaviors += int(histories.length_U.sum())
        self._weight += int((histories.length_U + _ROW).sum())
        if self._weight > BATCH:
            self._write(rest=False)

    def _write(self, *, rest: bool) -> None:
        if not self.users:
            return
        held = concatenated(self._held)
        after_U = np.cumsum(held.length_U + _ROW)
        start = 0
        while start < len(held):
            before = int(after_U[start - 1]) if start else 0
            # As many as fit, but at least one user.
            end = max(int(np.searchsorted(after_U, before + BATCH, side="right")), start + 1)
            if end >= len(held) and not rest:
                break
            self._write_batch(held.slice(start, end))
            start = end
        self._held = [held.slice(start, len(held))]
        self._weight = int((self._held[0].length_U + _ROW).sum())

    def _write_batch(self, histories: Histories) -> None:
        offsets = pa.array(np.concatenate([[0], np.cumsum(histories.length_U)]), pa.int32())
        columns = {"user_id": histories.user_id_U, "key": histories.key_U, "crc32": histories.checksums()}
        arrays = []
        for field in self.schema:
            values = (columns | histories.users | histories.behaviors)[field.name]
            lists = pa.types.is_list(field.type)
            array = values if isinstance(values, pa.Array) else pa.array(np.ascontiguousarray(values))
            arrays.append(pa.ListArray.from_arrays(offsets, array, type=field.type) if lists else array)
        batch = pa.record_batch(arrays, schema=self.schema)
        self._writer = self._writer or pa.ipc.new_file(str(self.path), self.schema)
        self._writer.write_batch(batch, custom_metadata={_KEYS: _key_checksum(histories.key_U)})


class Found(NamedTuple):
    """Where wanted users are in a record batch."""

    batch: int
    row_K: I64
    wanted_K: I64
    """Which of the wanted users it may be: its key is the same."""
    length_K: I64
    """Its behaviours, as the file says; not verified."""


class HistoryFile:
    """A file of histories, mapped into memory.

    Args:
        path: of the file, on this machine.
        schema: `schemas.shards.layer_schema`.

    Raises:
        UserError: it is not what was written.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            # Users lie anywhere: reading ahead would read the whole file.
            mapped.madvise(mmap.MADV_RANDOM)
            reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapped)))
            loaded = [reader.get_batch_with_custom_metadata(number) for number in range(reader.num_record_batches)]
            self._batches: list[pa.RecordBatch] = [batch for batch, _ in loaded]
            for batch in self._batches:
                # Of sizes alone: contents have their checksums.
                batch.validate()
        except (pa.ArrowException, OSError, ValueError, EOFError):
            raise self._damaged() from None
        self._schema = schema
        if reader.schema != schema or not all(map(len, self._batches)):
            raise self._damaged()
        columns = [column for batch in self._batches for column in batch.columns]
        values = [column.values for column in columns if pa.types.is_list(column.type)]
        if any(array.null_count for array in (*columns, *values)):
            raise self._damaged()
        self.keys = [batch["key"].to_numpy() for batch in self._batches]
        """Keys of the users of each record batch, in order."""
        for (_, metadata), key_U in zip(loaded, self.keys, strict=True):
            if _key_checksum(key_U) != dict(metadata or {}).get(_KEYS):
                raise self._damaged()
        self.users = sum(map(len, self._batches))

    def find(self, key_K: NDArray[np.int32]) -> Iterator[Found]:
        """Find users by their keys, in order; users whose keys are equal are found several times."""
        for number, key_U in enumerate(self.keys):
            first = int(np.searchsorted(key_K, key_U[0], side="left"))
            last = int(np.searchsorted(key_K, key_U[-1], side="right"))
            left = np.searchsorted(key_U, key_K[first:last], side="left")
            count = np.searchsorted(key_U, key_K[first:last], side="right") - left
            if count.any():
                row_K = ranges(left, count)
                _, length_K = self._bounds(number, _ITEM, row_K)
                yield Found(number, row_K, first + np.repeat(np.arange(last - first), count), length_K)

    def rows(self, after: int, to: int) -> Iterator[tuple[int, I64]]:
        """Record batches, and rows in them, of the users whose keys are above ``after`` and at most ``to``."""
        for number, key_U in enumerate(self.keys):
            first, last = np.searchsorted(key_U, [after, to], side="right")
            if last > first:
                yield number, np.arange(first, last)

    def take(self, number: int, row_U: I64) -> Histories:
        """Read and verify rows of a record batch.

        Raises:
            UserError: one is not what was written.
        """
        batch = self._batches[number]
        columns: dict[str, NDArray[Any]] = {}
        length_U = np.zeros(len(row_U), np.int64)
        for name in self._schema.names:
            if pa.types.is_list(self._schema.field(name).type):
                start_U, length_U = self._bounds(number, name, row_U)
                columns[name] = batch[name].values.to_numpy()[ranges(start_U, length_U)]
            elif name != "user_id":
                columns[name] = batch[name].to_numpy()[row_U]
        same = {len(values) for name, values in columns.items() if name.startswith("history_")}
        histories = Histories(
            self._user_ids(batch["user_id"], row_U),
            columns["key"],
            length_U,
            {name: columns[name] for name in _names(self._schema, "user_")},
            {name: columns[name] for name in _names(self._schema, "history_")},
        )
        if len(same) > 1 or not np.array_equal(histories.checksums(), columns["crc32"]):
            raise self._damaged()
        return histories

    def _user_ids(self, column: pa.Array, row_U: I64) -> pa.Array:
        if pa.types.is_integer(column.type):
            return column.take(pa.array(row_U))
        _, offsets, content = column.buffers()
        offset = np.frombuffer(offsets, np.int32, len(column) + 1)
        text = np.frombuffer(content or b"", np.uint8)
        start_U, end_U = self._checked(offset[row_U], offset[row_U + 1], len(text))
        ends = np.concatenate([[0], np.cumsum(end_U - start_U)]).astype(np.int32)
        taken = text[ranges(start_U, end_U - start_U)]
        ids = pa.StringArray.from_buffers(len(row_U), pa.py_buffer(ends), pa.py_buffer(taken))
        try:
            ids.validate(full=True)
        except pa.ArrowInvalid:  # no UTF-8
            raise self._damaged() from None
        return ids

    def _bounds(self, number: int, name: str, row_U: I64) -> tuple[I64, I64]:
        """First value and number of values of a list in each row."""
        lists = self._batches[number][name]
        offset = lists.offsets.to_numpy()
        start_U, end_U = self._checked(offset[row_U], offset[row_U + 1], len(lists.values))
        return start_U, end_U - start_U

    def _checked(self, start_U: NDArray[Any], end_U: NDArray[Any], size: int) -> tuple[I64, I64]:
        # Before anything is read there: offsets are the only numbers that say where to read.
        if (start_U < 0).any() or (end_U < start_U).any() or (end_U > size).any():
            raise self._damaged()
        return start_U.astype(np.int64), end_U.astype(np.int64)

    def _damaged(self) -> UserError:
        return UserError(f"{self._path} is damaged: a checksum in it differs; {REMEDY}")


def ranges(start_R: NDArray[Any], length_R: NDArray[Any]) -> I64:
    """The numbers ``start`` .. ``start + length`` of each run, one run after the other."""
    before_R = np.cumsum(length_R) - length_R
    index: I64 = np.repeat(start_R - before_R, length_R) + np.arange(int(length_R.sum()))
    return index


def _key_checksum(key_U: NDArray[np.int32]) -> bytes:
    return f"{zlib.crc32(np.ascontiguousarray(key_U).view(np.uint8).data):08x}".encode()


def _unknown(values: NDArray[Any]) -> float:
    return NO_NUMBER if values.dtype == np.float64 else 0


def _names(schema: pa.Schema, prefix: str) -> list[str]:
    return [name for name in schema.names if name.startswith(prefix) and name != "user_id"]


def concatenated(parts: list[Histories]) -> Histories:
    """Users of all parts, one part after the other."""
    if len(parts) == 1:
        return parts[0]
    return Histories(
        pa.concat_arrays([part.user_id_U for part in parts]),
        np.concatenate([part.key_U for part in parts]),
        np.concatenate([part.length_U for part in parts]),
        {name: np.concatenate([part.users[name] for part in parts]) for name in parts[0].users},
        {name: np.concatenate([part.behaviors[name] for part in parts]) for name in parts[0].behaviors},
    )
