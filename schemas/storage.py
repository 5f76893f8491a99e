"""Paths on remote storage, which stand where a `Path` of a disk stands: ``s3://bucket/folder``.

All bytes of an object store are read here, by ranges, and each read is tried again where the store has failed it. What
is read or written whole or in order needs no more than the methods of `RemotePath`; what needs a file of this machine
(a name that a library opens by itself, memory that is mapped) gets `local_copy`.
"""

import errno
import hashlib
import io
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any, Self
from urllib.parse import parse_qsl

import pyarrow as pa

from schemas.errors import UserError
from schemas.stores import OPTIONS, Place, Store

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(/+)")
BUFFER = 4 << 20
"""Bytes that are fetched at a time where a file is read in order."""

_QUERY = re.compile(r"\?(?=[A-Za-z_]+=)")
"""Where the options of a URL begin. Any other question mark is part of a pattern."""


class RemotePath(PosixPath):
    """A file or a folder on remote storage.

    A `Path` in all that is done with the name, and in reading; `read_bytes`, `open`, `stat`, `iterdir` and the like go
    to the store. `os.fspath` of one fails, so that nothing takes it for a file of this machine.

    It is made of a URL such as ``s3://bucket/folder?endpoint_override=host:9000&scheme=http``.
    """

    _place: Place

    def __new__(cls, url: str) -> Self:
        """Take a URL apart.

        Raises:
            UserError: the URL names no bucket or host, or holds credentials, or an option that is not known.
        """
        match = URL.match(url)
        assert match, "no URL"
        scheme = match[1].lower()
        rest, *query = _QUERY.split(url[match.end() :], maxsplit=1)
        hadoop = scheme in ("hdfs", "viewfs")
        # ``hdfs:///`` and ``hdfs:/`` mean the default host; a `Path` of another URL has lost a slash.
        named = len(match[2]) == 2 or (len(match[2]) == 1 and not hadoop)
        host, _, inside = rest.partition("/") if named else ("", "", rest)
        if "@" in host and not hadoop:
            raise UserError(
                f"{scheme}://...@{host.rpartition('@')[2]}: a URL holds no credentials, for it is shown and recorded; "
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what the store's own tools take"
            )
        if not host and not hadoop:
            raise UserError(f"{url}: the URL names no bucket")
        unknown = sorted({name for name, _ in parse_qsl("".join(query))} - set(OPTIONS))
        if unknown:
            raise UserError(f"{scheme}://{host}/{inside}: unknown option {unknown[0]}; known: {', '.join(OPTIONS)}")
        return cls._of(Place(scheme, host, "".join(query), PurePosixPath("/", inside)))

    @classmethod
    def _of(cls, place: Place) -> Self:
        path = object.__new__(cls)
        path._place = place
        return path

    def __init__(self, *_: object) -> None:
        """Take no arguments: `__new__` has."""

    def _at(self, inside: PurePosixPath) -> Self:
        return self._of(self._place._replace(inside=inside))

    # Names

    @property
    def url(self) -> str:
        """The URL without its options."""
        return self._place.url

    def __str__(self) -> str:
        return f"{self.url}?{self._place.query}" if self._place.query else self.url

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is no path of this machine")

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (str(self),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: PurePosixPath) -> bool:  # type: ignore[override]
        return str(self) < str(other)

    def __gt__(self, other: PurePosixPath) -> bool:  # type: ignore[override]
        return str(self) > str(other)

    def __truediv__(self, name: str | os.PathLike[str]) -> Self:
        return self._at(self._place.inside / name)

    @property
    def name(self) -> str:
        """The last part."""
        return self._place.inside.name or self._place.host

    @property
    def suffix(self) -> str:
        """Ending of the name, with its dot."""
        return self._place.inside.suffix

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return self._place.inside.stem

    @property
    def parent(self) -> Self:
        """The folder that this is in."""
        return self._at(self._place.inside.parent)

    @property
    def parts(self) -> tuple[str, ...]:
        """Bucket or host as one part, then the names."""
        return (f"{self._place.scheme}://{self._place.host}/", *self._place.inside.parts[1:])

    def with_name(self, name: str) -> Self:
        """Return the path beside this one with another name."""
        return self._at(self._place.inside.with_name(name))

    def relative_to(self, other: Any) -> PurePosixPath:  # type: ignore[override]
        """Return the way from a folder above to this one; errors are those of `Path.relative_to`."""
        if not isinstance(other, RemotePath) or self._place[:2] != other._place[:2]:
            raise ValueError(f"{self} is not below {other}")
        return self._place.inside.relative_to(other._place.inside)

    def absolute(self) -> Self:
        """Return this path: every URL is absolute."""
        return self

    def resolve(self, strict: bool = False) -> Self:
        """Return this path: stores have no links."""
        return self

    def is_symlink(self) -> bool:
        """No: stores have no links."""
        return False

    # What is there

    def _info(self) -> Any:
        info = self._place.ask(lambda store, key: store.files.get_file_info(key))
        if info.type.name == "NotFound" and not self._place.bucket_is_there():
            raise UserError(f"{self.url}: there is no such bucket")
        return info

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Return kind, size and time of what is there; all else is 0.

        Raises:
            FileNotFoundError: nothing is.
            UserError: the store cannot be reached, or refuses.
        """
        info = self._info()
        if info.type.name == "NotFound":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        kind = stat.S_IFDIR if info.type.name == "Directory" else stat.S_IFREG
        seconds = int(info.mtime.timestamp()) if info.mtime is not None else 0
        return os.stat_result((kind | 0o644, 0, 0, 1, 0, 0, info.size or 0, seconds, seconds, seconds))

    def exists(self) -> bool:
        """Whether there is a file or a folder with something in it."""
        return self._info().type.name != "NotFound"  # type: ignore[no-any-return]

    def is_file(self) -> bool:
        """Whether it is a file."""
        return self._info().type.name == "File"  # type: ignore[no-any-return]

    def is_dir(self) -> bool:
        """Whether it is a folder with something in it."""
        return self._info().type.name == "Directory"  # type: ignore[no-any-return]

    def files(self) -> dict[Self, int]:
        """Return all files below this folder, at any depth, sorted, with their sizes; none if it is not there."""
        return {
            self._below(info.path): info.size or 0
            for info in sorted(self._list(recursive=True), key=lambda info: info.path)
            if info.type.name == "File"
        }

    def iterdir(self) -> Iterator[Self]:  # type: ignore[override]
        """Return what is in this folder, sorted; nothing if it is not there."""
        return iter(sorted(self._below(info.path) for info in self._list(recursive=False)))

    def glob(self, pattern: str) -> Iterator[Self]:  # type: ignore[override]
        """Return what is in this folder and matches a pattern of one part, sorted."""
        assert "/" not in pattern
        return (path for path in self.iterdir() if PurePosixPath(path.name).match(pattern))

    def _list(self, *, recursive: bool) -> list[Any]:
        from pyarrow.fs import FileSelector

        return self._place.ask(
            lambda store, key: store.files.get_file_info(FileSelector(key, allow_not_found=True, recursive=recursive))
        )

    def _below(self, key: str) -> Self:
        """The path of what a listing of this folder has called ``key``."""
        return self / key.strip("/")[len(self._place.key.strip("/")) :].lstrip("/")

    # Reading and writing

    def open(self, mode: str = "rb", buffering: int = -1, *_: Any, **__: Any) -> Any:
        """Open a file to read its bytes, or (``wb``) to write it in order; it is there when it is closed.

        With ``buffering=0`` nothing is fetched but what is asked for.

        Raises:
            FileNotFoundError: it is not there.
            UserError: the store cannot be reached, or refuses; also of what is opened, while it is read.
        """
        if mode == "wb":
            stream = _Writer(self._place)
            return stream if buffering == 0 else io.BufferedWriter(stream)
        assert mode in ("rb", "r"), "nothing is appended to a file of a store"
        raw = _RangeReader(self)
        binary = raw if buffering == 0 else io.BufferedReader(raw, BUFFER)
        return io.TextIOWrapper(binary, "utf-8") if mode == "r" else binary

    def read_bytes(self) -> bytes:
        """Read a file whole; errors are those of `open`."""
        with self.open("rb", buffering=0) as file:
            content: bytes = file.read()
        return content

    def read_text(self, *_: Any, **__: Any) -> str:
        """Read a file of UTF-8 whole; errors are those of `open`."""
        return self.read_bytes().decode()

    def write_bytes(self, content: Any) -> int:
        """Write a file, which is there with all its content or as it was before.

        Raises:
            UserError: the store cannot be reached, or refuses.
        """

        def write(store: Store, key: str) -> None:
            with store.writer(key) as stream:
                stream.write(content)
            store.check_size(key, len(content))

        self._place.ask(write)
        return len(content)

    def write_text(self, data: str, *_: Any, **__: Any) -> int:
        """Write a file of UTF-8; see `write_bytes`."""
        return self.write_bytes(data.encode())

    def upload(self, file: Path) -> None:
        """Write a file that is a copy of one of this machine; see `write_bytes`."""

        def write(store: Store, key: str) -> None:
            # Where this fails, half of a file may stay: what makes a folder whole is written after it.
            with file.open("rb") as source, store.writer(key) as stream:
                while block := source.read(2 * BUFFER):
                    stream.write(block)
            store.check_size(key, file.stat().st_size)

        self._place.ask(write)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove a file.

        Raises:
            FileNotFoundError: it is not there, unless ``missing_ok``.
            UserError: the store cannot be reached, or refuses.
        """
        if not self.is_file():
            if missing_ok:
                return
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        self._place.ask(lambda store, key: store.files.delete_file(key))

    def remove_tree(self) -> None:
        """Remove a folder with all that is in it; nothing, if it is not there."""
        if self.exists():
            self._place.ask(lambda store, key: store.files.delete_dir(key))

    def rename(self, target: Any) -> Self:
        """Move a file, which may take as long as reading and writing it."""
        self._place.ask(lambda store, key: store.files.move(key, target._place.key))
        return target  # type: ignore[no-any-return]

    replace = rename

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: folders are there while something is in them."""


class _Writer(io.RawIOBase):
    """A file of a store, written in order; pyarrow tries again what has failed."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self._place, self._position = place, 0
        self._stream = place.ask(lambda store, key: store.writer(key))

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, content: Any) -> int:
        with self._place.told():
            self._stream.write(content)
        size = memoryview(content).nbytes
        self._position += size
        return size

    def close(self) -> None:
        if not self.closed:
            super().close()
            with self._place.told():
                self._stream.close()


class _RangeReader(io.RawIOBase):
    """A file of a store, read by ranges; each range arrives whole, or the read fails."""

    def __init__(self, path: RemotePath) -> None:
        super().__init__()
        self._path = path
        self._size = path.stat().st_size
        self._position = 0
        self._file: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        content = self._range(min(len(view), max(0, self._size - self._position)))
        view[: len(content)] = content
        return len(content)

    def readall(self) -> bytes:
        return self._range(max(0, self._size - self._position))

    def _range(self, size: int) -> bytes:
        if not size:
            return b""

        def fetch(store: Store, key: str) -> bytes:
            try:
                self._file = self._file or store.files.open_input_file(key)
                content: bytes = self._file.read_at(size, self._position)
            except BaseException:
                self._file = None
                raise
            if len(content) != size:
                self._file = None
                raise OSError(errno.EIO, f"{len(content)} bytes of {size} have arrived")
            return content

        content = self._path._place.ask(fetch)
        self._position += size
        return content

    def close(self) -> None:
        self._file = None
        super().close()


def arrow_file(path: Path) -> pa.NativeFile:
    """Open a file for Arrow, of this machine or remote; errors are those of pyarrow and of `RemotePath.open`."""
    return pa.PythonFile(path.open("rb"), "r") if isinstance(path, RemotePath) else pa.OSFile(str(path))


def local_copy(path: Path, checksum: str) -> Path:
    """Return a file of this machine with the content of ``path``: itself, or a copy that is made once.

    Copies are kept by checksum in a folder of the temporary directory; several processes of a machine share them. The
    content is compared with the checksum by whoever uses it.

    Args:
        path: of the file.
        checksum: SHA-256 of its content, in hexadecimal.
    """
    if not isinstance(path, RemotePath):
        return path
    folder = Path(tempfile.gettempdir(), f"dare-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to somebody else; set TMPDIR to another folder")
    copy = folder / f"{checksum[:32]}-{path.name}"
    if copy.exists() and sha256(copy) == checksum:
        return copy
    handle, unfinished = tempfile.mkstemp(dir=folder)
    try:
        with os.fdopen(handle, "wb") as target, path.open("rb") as source:
            while block := source.read(2 * BUFFER):
                target.write(block)
        os.replace(unfinished, copy)
    except BaseException:
        with suppress(OSError):
            os.unlink(unfinished)
        raise
    return copy


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
