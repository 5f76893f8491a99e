"""Stores of histories by their URLs: embedded, or a server of Redis."""

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from pipeline.serve.history_store import HistoryStore, printable_url
from pipeline.serve.stored_columns import StoredColumns
from schemas.errors import StoreError, UserError

__all__ = ["HistoryStore", "check_place", "is_store", "open_store"]


def open_store(
    url: str, columns: StoredColumns | None = None, keep: int | None = None, *, read_only: bool = False
) -> HistoryStore:
    """Open a store of histories, or make one.

    Args:
        url: ``lmdb:PATH`` or a path, a folder of this machine; or ``redis://HOST:PORT/DATABASE?prefix=NAME``.
        columns: what a new store has; one that is there must have the same. None: it must be there.
        keep: the last so many events of each user; None: what the store keeps, `KEEP` if it is new.
        read_only: nothing is appended; then a store of which one may only read can be opened.

    Raises:
        UserError: there is none, it is no store, or one of another format, or with other columns.
        StoreError: the store is down.
        OSError: it may not be written.
    """
    path = _path(url)
    if path is None:
        from pipeline.serve.redis_store import RedisStore

        return RedisStore(url, columns, keep)
    from pipeline.serve.lmdb_store import LmdbStore

    return LmdbStore(path, columns, keep, read_only=read_only)


def check_place(url: str) -> None:
    """Make sure that a store can be opened or made at a URL, as far as one can say without its columns.

    Nothing is left behind. A server is not asked: it may be down for a while.

    Raises:
        UserError: it is no URL of a store, or its folder cannot be made or not be written.
    """
    path = _path(url)
    if path is None:
        return
    made: list[Path] = []
    try:
        made = [each for each in (path, *path.parents) if not each.exists()]
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"{path}: no store of histories can be written here: {error.strerror}; name a folder that can be written"
        ) from None
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def _path(url: str) -> Path | None:
    """The folder of a store; None: it is a server's."""
    scheme, colon, rest = url.partition(":")
    if colon and scheme in ("redis", "rediss"):
        return None
    if colon and scheme != "lmdb" and "/" not in scheme and rest.startswith("/"):
        raise UserError(
            f"{printable_url(url)}: {scheme}: is no kind of store; a store is lmdb:PATH, a path, or redis://HOST:PORT/0"
        )
    path = rest if scheme == "lmdb" and colon else url
    if not path or "\0" in path:
        raise UserError(f"{url!r}: the path of the store is missing; is a variable of the shell not set?")
    return Path(path)


def is_store(url: str) -> bool:
    """Whether a store of histories is at a URL that can be read.

    Raises:
        StoreError: nobody can say, because its server is down.
    """
    try:
        open_store(url, read_only=True).close()
    except StoreError:
        raise
    except UserError:
        return False
    return True
