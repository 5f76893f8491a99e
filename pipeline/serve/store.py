"""Stores of histories by their URLs: embedded, or a server of Redis."""

from pathlib import Path

from pipeline.serve.history_store import HistoryStore, printable_url
from pipeline.serve.stored_columns import StoredColumns
from schemas.errors import StoreError, UserError

__all__ = ["HistoryStore", "is_store", "open_store"]


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
    scheme, colon, rest = url.partition(":")
    if colon and scheme in ("redis", "rediss"):
        from pipeline.serve.redis_store import RedisStore

        return RedisStore(url, columns, keep)
    if colon and scheme != "lmdb" and "/" not in scheme and rest.startswith("/"):
        raise UserError(
            f"{printable_url(url)}: {scheme}: is no kind of store; a store is lmdb:PATH, a path, or redis://HOST:PORT/0"
        )
    path = rest if scheme == "lmdb" and colon else url
    if not path or "\0" in path:
        raise UserError(f"{url!r}: the path of the store is missing; is a variable of the shell not set?")
    from pipeline.serve.lmdb_store import LmdbStore

    return LmdbStore(Path(path), columns, keep, read_only=read_only)


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
