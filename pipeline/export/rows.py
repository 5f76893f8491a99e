"""Writes the rows of a table for `pipeline.serve.rows`: some at a time, in the precision that is asked for.

X = rows that are written at a time, D = dim.
"""

import hashlib
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from schemas.errors import UserError
from schemas.manifest import File
from schemas.served import RowPrecision, ServedTable, file_of

LARGEST = 127
"""The largest int8 of a row: that of its entry farthest from 0."""


Stored = tuple[Tensor, Tensor | None]
"""Rows as they are stored, float32, bfloat16 or int8 (X, D), and for int8 what each is multiplied by, float32 (X,)."""


def write_rows(folder: Path, table: ServedTable, windows: Iterable[Stored]) -> list[File]:
    """Write the files of a table.

    Args:
        folder: of the exported model.
        table: what its rows are.
        windows: all rows of the table in order; a multiple of its ``block_rows`` at a time but for the last ones.

    Returns:
        The records of the files.

    Raises:
        UserError: a row has a value that is not finite, or that is none in the precision.
        OSError: the disk is full or broken.
    """
    file_of(folder, table.row_file).parent.mkdir(exist_ok=True)
    files = {
        name: _HashedFile(folder, name) for name in (table.row_file, table.checksum_file, table.scale_file) if name
    }
    try:
        written = 0
        for stored_XD, scale_X in windows:
            assert written % table.block_rows == 0, "rows come in whole blocks"
            _check_finite(table, written, stored_XD if scale_X is None else scale_X)
            for first in range(0, len(stored_XD), table.block_rows):
                block = slice(first, first + table.block_rows)
                content = _bytes_of(stored_XD[block])
                files[table.row_file].write(content)
                crc32 = zlib.crc32(content)
                if scale_X is not None and table.scale_file is not None:
                    content = _bytes_of(scale_X[block])
                    files[table.scale_file].write(content)
                    crc32 = zlib.crc32(content, crc32)
                files[table.checksum_file].write(memoryview(crc32.to_bytes(4, "little")))
            written += len(stored_XD)
        assert written == table.rows, f"{table.name}: {written} rows, not {table.rows}"
        return [file.finished() for file in files.values()]
    finally:
        for file in files.values():
            file.close()


def in_precision(rows_XD: Tensor, precision: RowPrecision) -> Stored:
    """Return rows as they are stored, and for int8 the scale of each.

    bf16 is the nearest one, of two equally near ones the even. int8 is the nearest multiple of the row's scale, which
    is a 127th of its largest magnitude; a row of zeros has the scale 0.

    Args:
        rows_XD: float32.
        precision: of the rows.
    """
    if precision == "fp32":
        return rows_XD, None
    if precision == "bf16":
        return rows_XD.to(torch.bfloat16), None
    scale_X = rows_XD.abs().amax(dim=1) / LARGEST
    # 0 / 0 is no number; whatever a row of zeros is divided by, it stays one.
    steps_XD = rows_XD / torch.where(scale_X == 0, 1.0, scale_X)[:, None]
    # What is not finite is refused by its scale, and has no int8.
    return steps_XD.nan_to_num(0.0).round().clamp(-LARGEST, LARGEST).to(torch.int8), scale_X


def _check_finite(table: ServedTable, first: int, stored: Tensor) -> None:
    finite_X = stored.isfinite().reshape(len(stored), -1).all(dim=1)
    if not bool(finite_X.all()):
        row = first + int(torch.nonzero(~finite_X)[0])
        what = "is not finite" if table.precision == "fp32" else f"is not finite in {table.precision}"
        raise UserError(f"table {table.name}: row {row} {what}; the run has diverged: export an earlier checkpoint")


def _bytes_of(tensor: Tensor) -> memoryview:
    content: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(content)


class _HashedFile:
    """A file that is written from its beginning to its end, and its checksum."""

    def __init__(self, folder: Path, name: str) -> None:
        self._name, self._digest, self._bytes = name, hashlib.sha256(), 0
        self._stream: BinaryIO = file_of(folder, name).open("wb")

    def write(self, content: memoryview) -> None:
        self._digest.update(content)
        self._bytes += self._stream.write(content)

    def finished(self) -> File:
        self._stream.close()
        return File(path=self._name, bytes=self._bytes, sha256=self._digest.hexdigest())

    def close(self) -> None:
        self._stream.close()
