"""Files of some rows of tables, in the format of safetensors: a JSON that says what is where, then the values.

Nothing in such a file is ever executed, and any library of the format reads it. For each table there are the tensor
``rows.TABLE``, which of its rows are there, in order, and tensors with as many rows: the table's values and the state
of its optimizer, by their keys in the checkpoint. The header's metadata say, for each table, of which of its rows the
writer knew: ``FIRST:LAST``, the last one not included.

N = rows in the file.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from schemas.errors import UserError

CHUNK_ROWS = 1 << 17
"""Rows that are in memory at a time where a file is read."""

_LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the format's own library."""

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.int32: "I32", torch.int64: "I64"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class TableRows:
    """Some rows of the part of a table that a rank has."""

    table: str
    """Its name."""
    first_row: int
    last_row: int
    """Which rows of the table the rank has: from the first one up to, not including, the last one."""
    row_N: Tensor
    """Which of them these are, counted in the whole table, int32 or int64, in order, on the CPU."""
    values: Mapping[str, Tensor]
    """By key of the checkpoint, (N,) or (N, columns), on the CPU."""


def write_rows(stream: BinaryIO, tables: Sequence[TableRows]) -> None:
    """Write rows of different tables into a file, from its beginning to its end."""
    tensors = dict[str, Tensor]()
    for of in tables:
        tensors |= {f"rows.{of.table}": of.row_N, **of.values}
    header: dict[str, Any] = {"__metadata__": {of.table: f"{of.first_row}:{of.last_row}" for of in tables}}
    end = 0
    for key, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    # The values begin at a multiple of eight bytes, so that they can be mapped into memory.
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        if tensor.numel():
            stream.write(memoryview(_bytes_of(tensor.contiguous())))


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.view(-1).view(torch.uint8).numpy()


class _DamageError(Exception):
    """Why the file is not one that `write_rows` has written."""


class RowsFile:
    """A file of rows, whose header has been checked. What the values are is checked as they are read.

    Args:
        path: of the file.

    Raises:
        UserError: it is missing, cannot be read, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._size = path.stat().st_size
            with path.open("rb", buffering=0) as file:
                self._begin = 8 + int.from_bytes(_read(file, 8), "little")
                if self._begin > min(self._size, 8 + _LONGEST_HEADER):
                    raise _DamageError("its header is longer than the file")
                header = json.loads(bytes(_read(file, self._begin - 8)))
            self._tensors, self.ranges = _checked(header, self._size - self._begin)
        except (FileNotFoundError, OSError, ValueError, RecursionError, _DamageError) as error:
            raise self._refusal(error) from None

    def __str__(self) -> str:
        return str(self._path)

    ranges: dict[str, tuple[int, int]]
    """By table, which of its rows the writer knew of: the first one, and the one after the last."""

    def count(self, table: str) -> int:
        """Return how many rows of a table are there."""
        index = self._tensors.get(f"rows.{table}")
        return 0 if index is None else index.shape[0]

    def chunks(self, table: str, keys: Sequence[str], first: int, last: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Read rows of a table in order, some at a time.

        Args:
            table: one of `ranges`.
            keys: which of its tensors.
            first: first row that is wanted, counted in the whole table.
            last: the row after the last one that is wanted.

        Returns:
            Which rows, int64 (N,), and the tensors, (N, ...) each; never none.

        Raises:
            UserError: the file lacks a tensor, or is damaged.
        """
        try:
            with self._path.open("rb", buffering=0) as file:
                yield from self._chunks(file, table, keys, first, last)
        except (OSError, _DamageError) as error:
            raise self._refusal(error) from None

    def _chunks(
        self, file: BinaryIO, table: str, keys: Sequence[str], first: int, last: int
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        index = self._tensors.get(f"rows.{table}")
        if index is None or len(index.shape) != 1 or index.dtype not in (torch.int32, torch.int64):
            raise _DamageError(f"it does not say which rows of {table} it has")
        for key in keys:
            if key not in self._tensors or self._tensors[key].shape[:1] != index.shape:
                raise _DamageError(f"it has not as many rows of {key} as of {table}")
        begin, end = self.ranges[table]
        before = begin - 1
        for start in range(0, index.shape[0], CHUNK_ROWS):
            row_N = self._part(file, index, start, min(start + CHUNK_ROWS, index.shape[0])).long()
            if row_N[0] <= before or row_N[-1] >= end or not bool((row_N[1:] > row_N[:-1]).all()):
                raise _DamageError(f"its rows of {table} are not in order between {begin} and {end}")
            before = int(row_N[-1])
            low, high = torch.searchsorted(row_N, torch.tensor([first, last])).tolist()
            if low < high:
                values = [self._part(file, self._tensors[key], start + low, start + high) for key in keys]
                yield row_N[low:high], values

    def _part(self, file: BinaryIO, tensor: "_Stored", start: int, end: int) -> Tensor:
        """Some rows of a tensor of the file."""
        part = torch.empty((end - start, *tensor.shape[1:]), dtype=tensor.dtype)
        if part.numel():
            file.seek(self._begin + tensor.offset + start * (part.nbytes // len(part)))
            _read_into(file, memoryview(_bytes_of(part)))
        return part

    def _refusal(self, error: Exception) -> UserError:
        if isinstance(error, FileNotFoundError):
            return UserError(f"{self._path} is missing")
        if isinstance(error, OSError):
            return UserError(f"{self._path} cannot be read: {error.strerror}")
        return UserError(f"{self._path} is damaged ({' '.join(str(error).split())[:200]})")


@dataclass(frozen=True)
class _Stored:
    """A tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes behind the header at which it begins."""


def _checked(header: Any, size: int) -> tuple[dict[str, _Stored], dict[str, tuple[int, int]]]:
    """The tensors of a header and the ranges of its tables; ``size``: bytes behind the header."""
    if not isinstance(header, dict):
        raise _DamageError("its header is no JSON object")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict):
        raise _DamageError("its header has no __metadata__")
    ranges, tensors = dict[str, tuple[int, int]](), dict[str, _Stored]()
    for table, text in metadata.items():
        match = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", text) if isinstance(text, str) else None
        if match is None or int(match[1]) > int(match[2]):
            raise _DamageError(f"its range of {table} is {text!r:.40}")
        ranges[table] = int(match[1]), int(match[2])
    for key, said in header.items():
        match said:
            case {"dtype": str(name), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
                dtype = _DTYPES.get(name)
                counts = all(isinstance(length, int) and 0 <= length < 1 << 48 for length in shape)
                # Python's integers do not overflow, whatever a file says.
                there = counts and 1 <= len(shape) <= 2 and 0 <= begin <= end <= size
                if there and dtype is not None and end - begin == math.prod(shape) * dtype.itemsize:
                    tensors[key] = _Stored(dtype, tuple(shape), begin)
                    continue
        raise _DamageError(f"its header says of {key!r:.60}: {said!r:.80}")
    return tensors, ranges


def _read(file: BinaryIO, size: int) -> bytearray:
    content = bytearray(size)
    _read_into(file, memoryview(content))
    return content


def _read_into(file: BinaryIO, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise _DamageError("it ends too early")
        done += count
