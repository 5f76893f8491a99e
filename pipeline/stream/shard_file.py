"""A shard that is open for reading, and every byte of which is verified before it is used."""

import hashlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import UserError
from schemas.manifest import Shard, read_footer, row_group_range
from schemas.storage import arrow_file


class ShardFile:
    """Reads row groups of a shard; use it as a context manager, or close it.

    A row group that is read with most of its columns is read whole and compared with its checksum in the manifest. Of a
    few columns, parquet's own checksums of pages are looked at: the others are not read at all.

    Args:
        path: of the file.
        shard: what the manifest says of it; None, or without checksums: pages alone are verified.

    Raises:
        UserError: it cannot be read, or its footer differs from its checksum.
    """

    def __init__(self, path: Path, shard: Shard | None) -> None:
        self.path, self._shard = path, shard
        self._by_page: pq.ParquetFile | None = None
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}; prepare the data set again") from None
        try:
            footer = read_footer(self._file)
            if shard is not None and shard.footer_sha256 not in (None, hashlib.sha256(footer).hexdigest()):
                raise _damaged(path, "its footer differs from its checksum")
            # What parquet looks for at the end of a file is all there. Later on, row groups alone are read.
            self.metadata = pq.read_metadata(pa.BufferReader(footer))
            self._bytes = _Bytes(self._file.seek(0, os.SEEK_END))
            self._verified = pq.ParquetFile(pa.PythonFile(self._bytes, "r"), metadata=self.metadata)
        except (OSError, pa.ArrowException) as error:
            self.close()
            raise _damaged(path, " ".join(str(error).split())) from None
        except UserError:
            self.close()
            raise

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema of the file."""
        schema: pa.Schema = self._verified.schema_arrow
        return schema

    def read(self, row_group: int, columns: Sequence[str]) -> pa.Table:
        """Read columns of a row group, in the calling thread alone.

        Raises:
            UserError: it cannot be read, or differs from its checksum.
        """
        checksums = None if self._shard is None else self._shard.row_group_crc32
        try:
            if checksums is None or 2 * len(columns) < len(self.schema):
                self._by_page = self._by_page or pq.ParquetFile(
                    arrow_file(self.path), metadata=self.metadata, page_checksum_verification=True
                )
                return self._by_page.read_row_group(row_group, columns, use_threads=False)
            start, end = row_group_range(self.metadata, row_group)
            self._file.seek(start)
            content = self._file.read(end - start)
            if f"{zlib.crc32(content):08x}" != checksums[8 * row_group : 8 * row_group + 8]:
                raise _damaged(f"{self.path}: row group {row_group}", "it differs from its checksum")
            # Read once: what was verified is what is decoded.
            self._bytes.hold(content, start)
            return self._verified.read_row_group(row_group, columns, use_threads=False)
        except (OSError, IndexError, pa.ArrowException) as error:
            raise _damaged(f"{self.path}: row group {row_group}", " ".join(str(error).split())) from None

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        if self._by_page is not None:
            self._by_page.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _damaged(what: object, why: str) -> UserError:
    return UserError(f"{what} cannot be read ({why}); prepare the data set again")


class _Bytes:
    """A file of which a part is in memory, as `pyarrow.PythonFile` wants one."""

    closed = False

    def __init__(self, size: int) -> None:
        self._size = size
        self.hold(b"", 0)

    def hold(self, content: bytes, start: int) -> None:
        """Keep the part that begins at ``start``."""
        self._content, self._start, self._position = memoryview(content), start, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> Any:
        first = self._position - self._start
        assert 0 <= first <= len(self._content), "parquet reads a row group alone"
        part = self._content[first : len(self._content) if size < 0 else first + size]
        self._position += len(part)
        return part

    def close(self) -> None:
        self._content = memoryview(b"")
