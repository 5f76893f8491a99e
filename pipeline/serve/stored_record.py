"""The record of one user in a store: what is kept, its bytes, and what events that arrive make of it.

A record's bytes are ours, so that nothing in them is executed: version, checksum, then a column after the other, in the
order of `StoredColumns`. Integers are kept as differences from the least one in as few bytes as the largest needs,
times as differences from the one before, texts that repeat as a dictionary: some bytes a behaviour.

N = behaviours of the user.
"""

import struct
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.serve.stored_columns import Events, StoredColumn, StoredColumns, UserId, Value, Values, as_list
from schemas.errors import UserError

VERSION = 1
"""The first byte of a record, which says its format."""
MOST_TIES = 1_000
"""Dropped events of the last dropped second that are remembered one by one."""

_HEAD = struct.Struct("<BI")
"""Version, and CRC-32 of the user's key and of all bytes behind it."""


@dataclass
class Record:
    """What is kept of one user."""

    moment: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """(N,) times in the log's unit. Their whole seconds are in order; equal ones are in their order of arrival."""
    behaviors: dict[str, Values] = field(default_factory=dict)
    """Column -> (N,) values."""
    user: dict[str, tuple[int, Value]] = field(default_factory=dict)
    """Column -> the last value that is known of the user, and the second from which it is."""
    floor: int | None = None
    """The last second of which an event was dropped, because more than the last N came: earlier events are not taken
    any more. None: all that came is kept."""
    ties: list[bytes] | None = field(default_factory=list)
    """Digests of the dropped events of that second; None: there are too many, so that no further one is taken of it."""


@dataclass(frozen=True)
class Merged:
    """What became of events that arrived."""

    record: Record
    new: int
    """Are kept, and were not there."""
    known: int
    """Were there already."""
    not_kept: int
    """Are older than the last N that are kept."""


def merged(record: Record, events: Events, columns: StoredColumns, keep: int, *, repeats: bool) -> Merged:
    """Add events to those of a user, and keep the last ``keep`` by time.

    Args:
        record: what is kept; not changed.
        events: what arrives, in its order.
        columns: of the store.
        keep: events that a user has at most.
        repeats: an event that comes twice among ``events`` is two, as in a log; without, it is one.
    """
    second_E = columns.seconds(events.moment)
    before_N = columns.seconds(record.moment)
    new_E = np.ones(len(events), bool)
    known = 0
    if not repeats or len(record.moment) or record.floor is not None:
        new_E, known = _new(record, events, columns, repeats=repeats)
    result = Record(record.moment, record.behaviors, _latest(record.user, events, second_E), record.floor, record.ties)
    new = np.flatnonzero(new_E)
    not_kept = len(events) - known - len(new)
    if not len(new):
        return Merged(result, 0, known, not_kept)
    together_N = np.concatenate([before_N, second_E[new]])
    # Mostly what arrives is the latest of all, and nothing moves.
    order = None if bool((np.diff(together_N) >= 0).all()) else np.argsort(together_N, kind="stable")
    excess = max(0, len(together_N) - keep)
    first = np.arange(excess) if order is None else order[:excess]
    pushed_out = int((first >= len(before_N)).sum())
    result.moment = np.concatenate([record.moment, events.moment[new]])
    if order is not None:
        result.moment = result.moment[order]
    result.behaviors = {
        column.name: _joined(record.behaviors.get(column.name, []), events.behaviors[column.name], new, order)
        for column in columns.behaviors
    }
    return Merged(_last(result, columns, excess), len(new) - pushed_out, known, not_kept + pushed_out)


def _new(record: Record, events: Events, columns: StoredColumns, *, repeats: bool) -> tuple[NDArray[np.bool_], int]:
    """Which events are not there and late enough to be taken, (E,); and how many are there."""
    second_E, before_N = columns.seconds(events.moment), columns.seconds(record.moment)
    # Events of other seconds cannot be the same.
    there: Counter[Any] = Counter()
    for second in np.unique(second_E):
        first, last = np.searchsorted(before_N, second, "left"), np.searchsorted(before_N, second, "right")
        there.update(_event(record.moment, record.behaviors, columns, index) for index in range(first, last))
    dropped = Counter(record.ties or ())
    new_E = np.zeros(len(events), bool)
    seen: set[Any] = set()
    known = 0
    for index, second in enumerate(second_E.tolist()):
        event = _event(events.moment, events.behaviors, columns, index)
        if there[event] > 0 or (not repeats and event in seen):
            there[event] -= 1
            known += 1
        elif record.floor is None or second > record.floor:
            new_E[index] = True
        elif second == record.floor and record.ties is not None:
            new_E[index] = not _taken(dropped, event)
        seen.add(event)
    return new_E, known


def _latest(
    former: dict[str, tuple[int, Value]], events: Events, second_E: NDArray[np.int64]
) -> dict[str, tuple[int, Value]]:
    """What is known of a user, with what ``events`` say."""
    user = dict(former)
    for name, (second, value) in events.user.items():
        there, known = user.get(name, (_NEVER, None))
        # By the value where seconds are equal, so that it does not matter what arrives again.
        if second is None or (second, str(value)) > (there, str(known)):
            user[name] = (there if second is None else second, value)
    return user


def _joined(former: Values, more: Values, new: NDArray[np.int64], order: NDArray[np.int64] | None) -> Values:
    """Values of a column: the former ones, then the new ones of ``more``, put in order."""
    if not len(former):
        joined = more if len(new) == len(more) else _at(more, new)
    elif isinstance(former, np.ndarray) and isinstance(more, np.ndarray):
        joined = np.concatenate([former, more[new]])
    else:
        joined = [*as_list(former), *as_list(_at(more, new))]
    return joined if order is None else _at(joined, order)


def _at(values: Values, index: NDArray[np.int64]) -> Values:
    return values[index] if isinstance(values, np.ndarray) else [values[each] for each in index.tolist()]


def _last(record: Record, columns: StoredColumns, excess: int) -> Record:
    """A record without its first ``excess`` events, which are remembered as dropped."""
    if not excess:
        return record
    second = columns.seconds(record.moment[:excess])
    floor = int(second[-1])
    ties = record.ties if floor == record.floor else []
    if ties is not None:
        first = int(np.searchsorted(second, floor, "left"))
        ties = (
            None
            if len(ties) + excess - first > MOST_TIES
            else sorted(
                [
                    *ties,
                    *(
                        _digest(_event(record.moment, record.behaviors, columns, index))
                        for index in range(first, excess)
                    ),
                ]
            )
        )
    return Record(
        record.moment[excess:],
        {name: values[excess:] for name, values in record.behaviors.items()},
        record.user,
        floor,
        ties,
    )


def _event(
    moment: NDArray[np.int64], behaviors: Mapping[str, Values], columns: StoredColumns, index: int
) -> tuple[Any, ...]:
    """All values of an event, by which it is told from others."""
    values = [behaviors[column.name][index] for column in columns.behaviors]
    return (int(moment[index]), *(_hashable(value) for value in values))


def _hashable(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return tuple(value) if isinstance(value, list) else value


def _digest(event: tuple[Any, ...]) -> bytes:
    # `repr` of integers, texts, floats and tuples of them tells all of them apart, on every machine alike.
    return blake2b(repr(event).encode(), digest_size=8).digest()


def _taken(dropped: Counter[bytes], event: tuple[Any, ...]) -> bool:
    """Whether an event is among the dropped ones; each of them is found once."""
    digest = _digest(event)
    dropped[digest] -= 1
    return dropped[digest] >= 0


_NEVER = -(2**63)


def user_key(user: UserId) -> bytes:
    """The key of a user's record: integers in their order, then texts in that of their bytes.

    A text of more than 500 bytes goes by its digest, because LMDB's keys are short.
    """
    if isinstance(user, int):
        return b"\x01" + struct.pack(">Q", user)
    text = user.encode()
    return b"\x02" + text if len(text) <= 500 else b"\x03" + blake2b(text, digest_size=32).digest()


def user_of(key: bytes, content: Callable[[], bytes]) -> UserId:
    """The user whose record has this key; its bytes are asked for where the key does not say it."""
    if key[:1] == b"\x01":
        return int(struct.unpack(">Q", key[1:])[0])
    if key[:1] == b"\x02":
        return key[1:].decode()
    return _verified(key, content()).text()


def encoded(key: bytes, user: UserId, record: Record, columns: StoredColumns) -> bytes:
    """The bytes of a record; equal records have equal ones."""
    out = bytearray()
    if key[:1] == b"\x03":
        assert isinstance(user, str)
        _put_text(out, user)
    _put_integer(out, len(record.moment))
    _put_integer(out, 0 if record.floor is None else 2 if record.ties is None else 1)
    if record.floor is not None:
        _put_integer(out, record.floor)
        if record.ties is not None:
            _put_integer(out, len(record.ties))
            out += b"".join(record.ties)
    for column in columns.users:
        _put_integer(out, int(column.name in record.user))
        if column.name in record.user:
            second, value = record.user[column.name]
            _put_integer(out, second)
            _put_column(out, column, [value])
    if len(record.moment):
        _put_integer(out, int(record.moment[0]))
        _put_integers(out, np.diff(record.moment))
    for column in columns.behaviors if len(record.moment) else ():
        _put_column(out, column, record.behaviors[column.name])
    return _HEAD.pack(VERSION, zlib.crc32(out, zlib.crc32(key))) + bytes(out)


def decoded(key: bytes, content: bytes, columns: StoredColumns) -> Record:
    """The record that bytes are of.

    Raises:
        UserError: they are of another version, or damaged; names the user.
    """
    read = _verified(key, content)
    if key[:1] == b"\x03":
        read.text()
    count, form = read.integer(), read.integer()
    record = Record()
    if form:
        record.floor = read.integer()
        record.ties = [read.bytes(8) for _ in range(read.integer())] if form == 1 else None
    for column in columns.users:
        if read.integer():
            record.user[column.name] = (read.integer(), as_list(read.column(column, 1))[0])
    if count:
        first = read.integer()
        record.moment = np.cumsum(np.append(first, read.integers(count - 1)), dtype=np.int64)
    record.behaviors = {column.name: read.column(column, count) if count else [] for column in columns.behaviors}
    return record


def _verified(key: bytes, content: bytes) -> "_Reader":
    if len(content) >= _HEAD.size:
        version, checksum = _HEAD.unpack_from(content)
        if version != VERSION:
            raise UserError(
                f"{_shown(key)}: its record has version {version}, and this program reads version {VERSION}; use the "
                "program that wrote it, or load the log into a new store"
            )
        if checksum == zlib.crc32(memoryview(content)[_HEAD.size :], zlib.crc32(key)):
            return _Reader(content)
    raise UserError(f"{_shown(key)}: its record is damaged; load the log into a new store")


def _shown(key: bytes) -> str:
    if key[:1] == b"\x01":
        return f"user {struct.unpack('>Q', key[1:])[0]}"
    return f"user {key[1:].decode()!r}" if key[:1] == b"\x02" else f"the user of digest {key[1:].hex()}"


def _put_integer(out: bytearray, value: int) -> None:
    """A single integer of 64 bits: 7 bits a byte, the sign in the lowest one."""
    value = value << 1 if value >= 0 else (-value << 1) - 1
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)


def _put_integers(out: bytearray, value_N: NDArray[np.int64]) -> None:
    if not len(value_N):
        return
    least = int(value_N.min())
    # Unsigned differences do not overflow.
    rest_N = value_N.view(np.uint64) - np.uint64(least & (2**64 - 1))
    width = (int(rest_N.max()).bit_length() + 7) // 8
    _put_integer(out, least)
    out.append(width)
    out += rest_N.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes()


def _put_text(out: bytearray, text: str) -> None:
    raw = text.encode()
    _put_integer(out, len(raw))
    out += raw


def _put_column(out: bytearray, column: StoredColumn, values: Values) -> None:
    # Arrays have no missing values.
    there = [] if isinstance(values, np.ndarray) else [value is not None for value in values]
    missing = not all(there)
    out.append(missing)
    if missing:
        out += np.packbits(there).tobytes()
        values = [value for value in values if value is not None]
    if column.several:
        _put_integers(out, np.array([len(each) for each in values], np.int64))
        values = [value for each in values for value in each]
    if not len(values):
        return
    if column.kind == "integer":
        _put_integers(out, np.asarray(values, np.int64))
    elif column.kind == "number":
        value_N = np.asarray(values, "<f8")
        with np.errstate(over="ignore"):
            single_N = value_N.astype("<f4")
        short = bool((single_N == value_N).all())
        out.append(short)
        out += (single_N if short else value_N).tobytes()
    else:
        number = {value: index for index, value in enumerate(dict.fromkeys(values))}
        several = 2 * len(number) <= len(values)
        _put_integer(out, len(number) if several else 0)
        raw = [value.encode() for value in (number if several else values)]
        _put_integers(out, np.array([len(each) for each in raw], np.int64))
        out += b"".join(raw)
        if several:
            _put_integers(out, np.array([number[value] for value in values], np.int64))


class _Reader:
    """Takes apart what the functions above have put together, in the same order."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, _HEAD.size

    def bytes(self, count: int) -> bytes:
        start = self._at
        self._at += count
        return self._content[start : self._at]

    def integer(self) -> int:
        value = shift = 0
        while True:
            byte = self._content[self._at]
            self._at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value >> 1 if not value & 1 else -(value + 1 >> 1)

    def text(self) -> str:
        return self.bytes(self.integer()).decode()

    def integers(self, count: int) -> NDArray[np.int64]:
        if not count:
            return np.zeros(0, np.int64)
        least = self.integer()
        width = self.bytes(1)[0]
        rest_NW = np.zeros((count, 8), np.uint8)
        rest_NW[:, :width] = np.frombuffer(self.bytes(count * width), np.uint8).reshape(count, width)
        value_N: NDArray[np.int64] = (rest_NW.view("<u8")[:, 0] + np.uint64(least & (2**64 - 1))).view(np.int64)
        return value_N

    def column(self, column: StoredColumn, count: int) -> Values:
        missing = self.bytes(1)[0]
        there_N = np.ones(count, bool)
        if missing:
            bits = np.frombuffer(self.bytes((count + 7) // 8), np.uint8)
            there_N = np.unpackbits(bits, count=count).astype(bool)
            count = int(there_N.sum())
        if column.several:
            length_N = self.integers(count)
            ends = np.cumsum(length_N).tolist()
            flat = as_list(self._scalars(column, ends[-1] if ends else 0))
            values: Values = [flat[end - length : end] for end, length in zip(ends, length_N.tolist(), strict=True)]
        else:
            values = self._scalars(column, count)
        if not missing:
            return values
        rest = iter(as_list(values))
        return [next(rest) if there else None for there in there_N.tolist()]

    def _scalars(self, column: StoredColumn, count: int) -> Values:
        if not count:
            return []
        if column.kind == "integer":
            return self.integers(count)
        if column.kind == "number":
            kind = np.dtype("<f4" if self.bytes(1)[0] else "<f8")
            return np.frombuffer(self.bytes(count * kind.itemsize), kind).astype(np.float64)
        distinct = self.integer()
        texts = self._texts(distinct or count)
        return [texts[index] for index in self.integers(count).tolist()] if distinct else texts

    def _texts(self, count: int) -> list[str]:
        ends = np.cumsum(self.integers(count)).tolist()
        raw = self.bytes(ends[-1])
        starts = [0, *ends[:-1]]
        if raw.isascii():
            text = raw.decode()
            return [text[start:end] for start, end in zip(starts, ends, strict=True)]
        return [raw[start:end].decode() for start, end in zip(starts, ends, strict=True)]
