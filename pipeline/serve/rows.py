"""Rows of a table of an exported model, mapped into memory and verified as they are read.

R = rows of the table, D = dim, X = rows that are asked for, B = blocks of rows that share a checksum.
"""

import ctypes
import mmap
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.errors import UserError
from schemas.served import REMEDY, ServedManifest, ServedTable, file_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
"""Types of rows by their precision."""


class TableKey(NamedTuple):
    """What a table of an exported model is found by."""

    set: str
    feature: str
    sequence: str | None
    search: bool = False
    """The coarser copy that the search alone reads."""


class StoredRows:
    """Rows of a table. Opening it reads none of them; many threads may read it at once, and nobody can write to it.

    Args:
        folder: of the exported model.
        manifest: of the folder.
        table: one of the manifest's tables.

    Raises:
        UserError: a file is missing or of another size, or its checksums are damaged.
    """

    def __init__(self, folder: Path, manifest: ServedManifest, table: ServedTable) -> None:
        self.table = table
        self._path = file_of(folder, table.row_file)
        checksums = manifest.verified(folder, table.checksum_file)
        self._crc32_B = np.fromfile(checksums, dtype="<u4")
        self._bytes_X = _mapped(self._path, table.rows * table.row_bytes)
        self.table_RD: Tensor = torch.from_numpy(self._bytes_X).view(DTYPES[table.precision]).view(-1, table.dim)
        """(R, D), float32, bfloat16 or int8, on the map. Whoever reads rows of it calls `check` with their ids
        first."""
        self.scale_R: Tensor | None = None
        """float32, on the map: what each int8 row is multiplied by; None for rows of floats."""
        self._scale_bytes_X: NDArray[np.uint8] | None = None
        if table.scale_file is not None:
            self._scale_bytes_X = _mapped(file_of(folder, table.scale_file), 4 * table.rows)
            self.scale_R = torch.from_numpy(self._scale_bytes_X).view(torch.float32)
        self._shift = table.block_rows.bit_length() - 1
        # A byte a block: setting one is atomic, and two threads that verify the same block find the same.
        self._verified_B = np.zeros(table.blocks, np.bool_)
        self._all_verified = False

    def __len__(self) -> int:
        return self.table.rows

    def rows(self, id_X: Tensor) -> Tensor:
        """Return rows as floats.

        Args:
            id_X: int32 or int64 of any shape, 0 .. R - 1.

        Returns:
            float32 (*X, D): what was written, exactly; of int8 rows, times their scale.

        Raises:
            UserError: a block with one of them differs from its checksum.
        """
        self.check(id_X)
        flat = id_X.reshape(-1)
        rows = self.table_RD.index_select(0, flat).float()
        if self.scale_R is not None:
            rows *= self.scale_R.index_select(0, flat)[:, None]
        return rows.view(*id_X.shape, self.table.dim)

    def all_rows(self) -> Tensor:
        """Return all rows, float32 (R, D), a copy; for small tables. Errors are those of `rows`."""
        self.verify()
        return self.rows(torch.arange(len(self)))

    def check(self, id_X: Tensor) -> None:
        """Verify the blocks of these rows, those that have not been verified yet.

        Raises:
            UserError: one differs from its checksum.
        """
        id = id_X.detach().numpy().reshape(-1)
        if not len(id):
            return
        # What is outside of the file would be read from whatever memory is there.
        assert 0 <= int(id.min()) <= int(id.max()) < self.table.rows, f"{self.table.name}: ids outside of its rows"
        if self._all_verified:
            return
        block_X = id >> self._shift
        if not self._verified_B.take(block_X).all():
            for block in np.unique(block_X[~self._verified_B[block_X]]).tolist():
                self._verify_block(block)

    def verify(self) -> None:
        """Verify all rows that have not been verified yet; it reads the file.

        Raises:
            UserError: a block differs from its checksum.
        """
        for block in np.flatnonzero(~self._verified_B).tolist():
            self._verify_block(block)
        self._all_verified = True

    def _verify_block(self, block: int) -> None:
        first = block << self._shift
        last = min(first + self.table.block_rows, self.table.rows)
        crc32 = zlib.crc32(self._bytes_X[first * self.table.row_bytes : last * self.table.row_bytes].data)
        if self._scale_bytes_X is not None:
            crc32 = zlib.crc32(self._scale_bytes_X[4 * first : 4 * last].data, crc32)
        if crc32 != self._crc32_B[block]:
            raise UserError(f"{self._path}: rows {first} to {last - 1} differ from their checksum; {REMEDY}")
        self._verified_B[block] = True


def open_tables(folder: Path, manifest: ServedManifest) -> dict[TableKey, StoredRows]:
    """Open all tables of an exported model; no rows are read. Errors are those of `StoredRows`."""
    return {
        TableKey(table.set, table.feature, table.sequence, table.search): StoredRows(folder, manifest, table)
        for table in manifest.tables
    }


def _mapped(path: Path, size: int) -> NDArray[np.uint8]:
    """The bytes of a file of known size, uint8 (size,), mapped into memory and read when they are."""
    try:
        with path.open("rb") as file:
            # Checked here too: reading behind the end of a mapped file kills the process.
            found = file.seek(0, 2)
            if found != size:
                raise UserError(f"{path} is {found} bytes, not {size}; {REMEDY}")
            # Shared and not to be written to, so that a table larger than the memory can be mapped.
            mapped = mmap.mmap(file.fileno(), size, mmap.MAP_SHARED, mmap.PROT_READ)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {REMEDY}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    # torch warns of arrays that nobody may write to. By its address the map is an array that says nothing of it; the
    # machine itself would refuse a write.
    memory = (ctypes.c_ubyte * size).from_address(np.frombuffer(mapped, np.uint8).ctypes.data)
    memory.keeps = mapped  # type: ignore[attr-defined]  # as long as an array or a tensor stands on it
    return np.ctypeslib.as_array(memory)
