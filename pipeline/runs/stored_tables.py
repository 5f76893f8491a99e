"""Tables of a checkpoint, read some rows at a time: without a model, and whatever ranks have written them.

torch's own reader takes each piece that a rank has written into memory whole. A piece is a file of `torch.save` within
a larger one: a zip, whose entry ``data.pkl`` says of what kind the tensor is, and whose entry ``data/0`` is its
values, which are read from where they lie. Nothing that a file names is called.

X = rows that are read at a time, D = dim, N = rows that a delta has.
"""

import io
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from pipeline.runs.checkpoint_files import Stored, load_values, stored_in
from pipeline.runs.delta import rows_files, table_of
from pipeline.runs.rows_file import RowsFile
from schemas.documents import inside
from schemas.errors import UserError

MODEL = "model."
"""What the keys of a model's own values begin with."""


class StoredTables:
    """The tables of a checkpoint, full or a delta.

    Args:
        checkpoint: its folder.

    Raises:
        UserError: it is damaged.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._stored = stored_in(checkpoint)
        tables = self._stored if self._stored.full is None else self._stored.full
        self._keys = {
            str(table_of(key)): key
            for key in tables.shapes
            if key.startswith(MODEL) and table_of(key) is not None and key.endswith(".weight")
        }
        self._tables = tables

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Rows and dim of each table, by its name."""
        return {name: self._tables.shapes[key] or () for name, key in self._keys.items()}

    def rows(self, name: str, count: int) -> Iterator[Tensor]:
        """Read all rows of a table in order; no more than these are in memory.

        Args:
            name: of the table.
            count: rows at a time, but for the last ones.

        Returns:
            float32 (X, D) each: what was written, exactly.

        Raises:
            UserError: a file is missing or damaged, or not all rows are there.
        """
        rows, dim = self.shapes[name]
        pieces = _pieces(self._tables, self._keys[name])
        for first, changes in zip(range(0, rows, count), self.changes(name, count), strict=True):
            window = torch.empty(min(count, rows - first), dim)
            if sum(piece.read(window, first) for piece in pieces) != window.numel():
                raise UserError(f"{self._tables.folder}: no file has all of table {name}; use another checkpoint")
            for row_N, values in changes:
                window[row_N] = values
            yield window

    def changes(self, name: str, count: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Read what a delta has of a table, for each so many rows of it; nothing of a full checkpoint.

        Args:
            name: of the table.
            count: rows at a time, but for the last ones.

        Returns:
            For each of these windows, which of its rows have changed, int64 (N,) from 0, and what they are, float32
            (N, D).

        Raises:
            UserError: a file is missing or damaged.
        """
        delta, (rows, dim) = self._stored.delta, self.shapes[name]
        files = [] if delta is None else rows_files(delta, name, rows)
        of_files = [_Changes(file, name, self._keys[name], dim) for file in files]
        for first in range(0, rows, count):
            yield [change for of_file in of_files for change in of_file.take(first, min(first + count, rows))]

    def changed(self, name: str) -> bool:
        """Whether a delta has rows of a table; errors are those of `changes`."""
        delta = self._stored.delta
        files = [] if delta is None else rows_files(delta, name, self.shapes[name][0])
        return any(file.count(name) for file in files)

    def dense(self) -> dict[str, Tensor]:
        """Return all that the model has beside its tables, by the names of its state.

        Raises:
            UserError: the checkpoint is damaged.
        """
        kinds = self._stored.metadata.state_dict_metadata
        values = {
            key: torch.empty(kind.size, dtype=kind.properties.dtype)
            for key, kind in kinds.items()
            if key.startswith(MODEL) and table_of(key) is None and isinstance(kind, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            # That it loads in a single process is what is meant.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load_values(dict(values), self._stored.folder)
        return {key.removeprefix(MODEL): value for key, value in values.items()}


class _Changes:
    """What a file of a delta has of a table: rows in order, taken as windows come to them."""

    def __init__(self, file: RowsFile, name: str, key: str, dim: int) -> None:
        self._file, self._key, self._dim = file, key, dim
        self._chunks = file.chunks(name, [key], *file.ranges[name])
        self._row_N, self._values = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dim)

    def take(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows up to, not including, the row ``last`` that were not taken before, counted from ``first``."""
        while True:
            here = int(torch.searchsorted(self._row_N, last))
            if here:
                yield self._row_N[:here] - first, self._values[:here].float()
                self._row_N, self._values = self._row_N[here:], self._values[here:]
            found = None if len(self._row_N) else next(self._chunks, None)
            if found is None:
                return
            self._row_N, (self._values,) = found
            if self._values.shape[1:] != (self._dim,):
                shape = tuple(self._values.shape[1:])
                raise UserError(f"{self._file} has rows of {self._key} that are {shape}, not {self._dim}")


@dataclass(frozen=True)
class _Piece:
    """A part of a table that a rank has written."""

    path: Path
    begin: int
    """Byte of the file at which its values begin."""
    dtype: torch.dtype
    rows: tuple[int, int]
    """Which rows of the table: from the first one up to, not including, the last one."""
    columns: tuple[int, int]

    def read(self, window: Tensor, first: int) -> int:
        """Read what lies in a window (X, D) whose first row has the number ``first``; return how many values."""
        low, high = max(self.rows[0], first), min(self.rows[1], first + len(window))
        if low >= high:
            return 0
        part = torch.empty(high - low, self.columns[1] - self.columns[0], dtype=self.dtype)
        content: Any = part.view(-1).view(torch.uint8).numpy()
        begin = self.begin + (low - self.rows[0]) * part.shape[1] * part.element_size()
        try:
            with self.path.open("rb", buffering=0) as file:
                _read_into(file, begin, memoryview(content))
        except FileNotFoundError:
            raise UserError(f"{self.path} is missing; use another checkpoint") from None
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from None
        window[low - first : high - first, self.columns[0] : self.columns[1]] = part.float()
        return part.numel()


def _pieces(stored: Stored, key: str) -> list[_Piece]:
    """The parts of a table, whatever ranks have had of it."""
    kind = stored.metadata.state_dict_metadata[key]
    assert isinstance(kind, TensorStorageMetadata), key
    sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in kind.chunks}
    pieces = []
    for index, info in stored.metadata.storage_data.items():
        if index.fqn == key:
            offset = tuple(index.offset)
            rows, columns = sizes[offset]
            if not rows * columns:
                continue
            path = inside(stored.folder, info.relative_path)
            begin = _values_begin(path, info.offset, info.length, kind.properties.dtype, (rows, columns))
            ranges = (offset[0], offset[0] + rows), (offset[1], offset[1] + columns)
            pieces.append(_Piece(path, begin, kind.properties.dtype, *ranges))
    return pieces


def _values_begin(path: Path, offset: int, length: int, dtype: torch.dtype, shape: tuple[int, int]) -> int:
    """The byte of a file at which the values of a tensor begin that `torch.save` has written into a part of it.

    Raises:
        UserError: the part is damaged, or not such a tensor, its rows one after the other.
    """
    try:
        with path.open("rb", buffering=0) as file, zipfile.ZipFile(_Part(file, offset, length)) as parts:
            entries = {entry.filename.partition("/")[2]: entry for entry in parts.infolist()}
            found = _TensorUnpickler(io.BytesIO(parts.read(entries["data.pkl"]))).load()
            order = parts.read(entries["byteorder"])
            entry = entries["data/0"]
            # A local header: 30 bytes, the lengths of what follows among them, a name and what fills up to the values.
            header = bytearray(30)
            _read_into(file, offset + entry.header_offset, memoryview(header))
            begin = (
                entry.header_offset
                + 30
                + int.from_bytes(header[26:28], "little")
                + int.from_bytes(header[28:30], "little")
            )
    except FileNotFoundError:
        raise UserError(f"{path} is missing; use another checkpoint") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # whatever a damaged zip or pickle raises
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())[:80]}); use another checkpoint") from None
    size = shape[0] * shape[1] * dtype.itemsize
    whole = entry.compress_type == zipfile.ZIP_STORED and entry.file_size == size and begin + size <= length
    if not (whole and order == b"little" and found == _Tensor(0, shape, (shape[1], 1))):
        raise UserError(
            f"{path} is damaged (no tensor of {shape[0]} x {shape[1]} where it says so); use another checkpoint"
        )
    return offset + begin


@dataclass(frozen=True)
class _Tensor:
    """What ``data.pkl`` says of a tensor: where it begins in its values, its shape and its strides."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(_: Any, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *__: Any) -> _Tensor:
    return _Tensor(offset, shape, stride)


_NAMES = {("torch._utils", "_rebuild_tensor_v2"): _tensor, ("collections", "OrderedDict"): OrderedDict}
"""All that ``data.pkl`` of a tensor names, but the type of its values, and what is called in their place."""


class _TensorUnpickler(pickle.Unpickler):
    """Reads what a tensor is, and makes none."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name.endswith("Storage"):
            return name
        if (module, name) not in _NAMES:
            raise ValueError(f"it names {module}.{name}")
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> Any:
        # What and where the values are is known from the checkpoint's metadata, and compared with the zip's sizes.
        return pid


class _Part(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._offset + self._at)
        count: int = self._file.readinto(view)  # type: ignore[attr-defined]
        self._at += count
        return count


def _read_into(file: BinaryIO, offset: int, view: memoryview) -> None:
    file.seek(offset)
    while len(view):
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise OSError(0, "it ends too early")
        view = view[count:]
