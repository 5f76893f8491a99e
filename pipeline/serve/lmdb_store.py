"""A store of histories in a folder of this machine: LMDB, embedded, for several readers and one writer at a time.

Readers never wait. A writer waits for the one before, in whatever process it is. What a transaction has written is on
the disk when it ends; of one that was killed there is nothing.
"""

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import lmdb

from pipeline.errors import REFUSALS
from pipeline.serve.history_store import DESCRIPTION, Change, HistoryStore
from pipeline.serve.stored_columns import StoredColumns
from schemas.errors import UserError

_DATA = "data.mdb"
_FIRST_SIZE = 64 << 20
"""Bytes of address space that a new store is mapped into; doubled when it is full."""
_LEAST_FREE = 1 << 20
"""A disk with fewer bytes is full."""
_READERS = 1_024
"""Threads and processes that may read at the same moment."""


class LmdbStore(HistoryStore):
    """Histories in a folder; arguments beside it are those of `pipeline.serve.store.open_store`."""

    def __init__(self, path: Path, columns: StoredColumns | None, keep: int | None, *, read_only: bool = False) -> None:
        if not (path / _DATA).is_file():
            _check_new(path)
            if columns is None or read_only:
                raise UserError(f"{path}: there is no store of histories; `dare store load` makes one")
        self._mapped = _Mapped.open(path, read_only=read_only)
        try:
            super().__init__(str(path), columns, keep)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        with self._mapped.transaction() as transaction:
            return int(transaction.stat()["entries"]) - 1

    def close(self) -> None:
        """Let go of the store."""
        self._mapped.close()

    def _read(self, key: bytes) -> bytes | None:
        with self._mapped.transaction() as transaction:
            content = _bytes(transaction.get(key))
            if content is None and key == DESCRIPTION and transaction.stat()["entries"]:
                raise UserError(f"{self.url}: a database of LMDB, but no store of histories; name another folder")
        return content

    def _keys(self, start: bytes, count: int) -> list[bytes]:
        found: list[bytes] = []
        with self._mapped.transaction() as transaction, transaction.cursor() as cursor:
            more = cursor.set_range(start)
            while more and len(found) < count:
                found.append(bytes(cursor.key()))
                more = cursor.next()
        return found

    def _change(self, keys: Sequence[bytes], change: Change) -> None:
        def write(transaction: lmdb.Transaction) -> None:
            for key in keys:
                content = change(key, _bytes(transaction.get(key)))
                if content is not None:
                    transaction.put(key, content)

        self._mapped.write(write)

    def _create(self, description: bytes) -> None:
        self._mapped.write(lambda transaction: transaction.put(DESCRIPTION, description, overwrite=False))


def _bytes(content: bytes | memoryview | None) -> bytes | None:
    return None if content is None else bytes(content)


def _check_new(path: Path) -> None:
    """Make sure that a store can be made at a path where none is.

    Raises:
        UserError: something else is there.
    """
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path}: not a store of histories: a folder with other files; name one that is empty or new")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: not a store of histories, which is a folder; name one that is empty or new")


class _Mapped:
    """A database of LMDB that is mapped into this process, once, however often it is opened.

    The map grows when it is full, here or in another process. While it does, no transaction of this process may be
    open, so transactions are counted.
    """

    _opened: ClassVar[dict[tuple[int, int, int], "_Mapped"]] = {}
    """Process, device and inode of the file -> what is mapped."""
    _opening = threading.Lock()

    @classmethod
    def open(cls, path: Path, *, read_only: bool) -> "_Mapped":
        """The database in a folder, which is made if it may be written."""
        with cls._opening:
            mapped = cls._opened.get(_identity(path))
            if mapped is not None and not read_only and mapped._read_only:
                raise UserError(f"{path}: this process has opened it already, for reading alone")
            if mapped is None:
                mapped = cls(path, read_only=read_only)
                cls._opened[_identity(path)] = mapped
            mapped._users += 1
            return mapped

    def __init__(self, path: Path, *, read_only: bool) -> None:
        self._path, self._read_only, self._users = path, read_only, 0
        self._changed = threading.Condition()
        self._active, self._resizing = 0, False
        if not read_only:
            path.mkdir(parents=True, exist_ok=True)
        try:
            self._environment = lmdb.open(
                str(path),
                map_size=_FIRST_SIZE,
                create=not read_only,
                readonly=read_only,
                readahead=False,
                max_readers=_READERS,
                max_spare_txns=16,
            )
            # Of readers that were killed: what they read would be kept for ever.
            self._environment.reader_check()
        except lmdb.Error as error:
            raise self._told(error) from None

    def close(self) -> None:
        """Unmap it, unless it is open elsewhere in this process."""
        with self._opening:
            self._users -= 1
            if not self._users:
                for key in [key for key, each in self._opened.items() if each is self]:
                    del self._opened[key]
                self._environment.close()

    @contextmanager
    def transaction(self) -> Iterator[lmdb.Transaction]:
        """A moment of the database, to read."""
        while True:
            self._enter()
            try:
                transaction = self._environment.begin()
                break
            except lmdb.MapResizedError:
                self._leave()
                self._resize(0)
            except lmdb.Error as error:
                self._leave()
                raise self._told(error) from None
        try:
            with transaction:
                yield transaction
        except lmdb.Error as error:
            raise self._told(error) from None
        finally:
            self._leave()

    def write(self, work: Callable[[lmdb.Transaction], object]) -> None:
        """Call ``work`` with a transaction, again after the map has grown; all that it writes is on the disk then."""
        while True:
            self._enter()
            try:
                size = self._environment.info()["map_size"]
                with self._environment.begin(write=True) as transaction:
                    work(transaction)
                return
            except lmdb.MapFullError:
                larger = 2 * size
            except lmdb.MapResizedError:
                larger = 0
            except lmdb.Error as error:
                raise self._told(error) from None
            finally:
                self._leave()
            self._resize(larger)

    def _enter(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._resizing)
            self._active += 1

    def _leave(self) -> None:
        with self._changed:
            self._active -= 1
            self._changed.notify_all()

    def _resize(self, size: int) -> None:
        """Map so many bytes, unless there are as many; 0: as many as another process has made it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._resizing)
            self._resizing = True
            self._changed.wait_for(lambda: not self._active)
            try:
                if not size or size > self._environment.info()["map_size"]:
                    self._environment.set_mapsize(size)
            except lmdb.Error as error:
                raise self._told(error) from None
            finally:
                self._resizing = False
                self._changed.notify_all()

    def _told(self, error: lmdb.Error) -> Exception:
        """The error of this program that one of LMDB is."""
        code = getattr(error, "code", None) or 0
        # LMDB calls it so when a part of a page was written. Where the disk is full, that has taken the rest of it.
        if code == errno.EIO and _free_bytes(self._path) < _LEAST_FREE:
            code = errno.ENOSPC
        if code in REFUSALS:
            return OSError(code, os.strerror(code), str(self._path))
        if isinstance(error, lmdb.ReadersFullError):
            return UserError(f"{self._path}: more than {_READERS:,} threads and processes read it; end some of them")
        if isinstance(error, _DAMAGE):
            return UserError(f"{self._path}: {_DATA} is damaged, or no database of LMDB; load the log into a new store")
        return error


_DAMAGE = (
    lmdb.InvalidError,
    lmdb.VersionMismatchError,
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    lmdb.IncompatibleError,
)


def _free_bytes(path: Path) -> int:
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize


def _identity(path: Path) -> tuple[int, int, int]:
    try:
        found = (path / _DATA).stat()
    except FileNotFoundError:
        return os.getpid(), 0, 0  # no file has the inode 0
    return os.getpid(), found.st_dev, found.st_ino
