"""A store of histories in a server of Redis, for several machines that write at the same time.

A record is read, changed here, and written by a script that does so only while the record is still the one that was
read. The server decides when what it has acknowledged is on its disk: see its ``appendonly`` and ``appendfsync``.
"""

import hashlib
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from pipeline.serve.history_store import DESCRIPTION, Change, HistoryStore, printable_url
from pipeline.serve.stored_columns import StoredColumns
from schemas.errors import StoreError, UserError

_CONNECT_S, _ANSWER_S = 2.0, 5.0
"""Seconds in which the server must take a connection, and answer."""
_PATIENCE_S = 10.0
"""Seconds after which a record that others change all the time is given up."""
_REPLACE = """
local content = redis.call('GET', KEYS[1])
if (content and redis.sha1hex(content) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('ZADD', KEYS[2], 0, ARGV[3])
return 1
"""
"""Write a record and the name of its user, if the record is still the one of a digest."""

T = TypeVar("T")


class RedisStore(HistoryStore):
    """Histories in a server of Redis; arguments are those of `pipeline.serve.store.open_store`."""

    def __init__(self, url: str, columns: StoredColumns | None, keep: int | None) -> None:
        self._shown = printable_url(url)
        try:
            parts = urlsplit(url)
            options = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
            prefix = options.pop("prefix", ["dare"])[0]
            if options or not prefix:
                raise ValueError("its only option is ?prefix=NAME")
            if parts.path not in ("", "/") and not parts.path[1:].isdigit():
                raise ValueError("its path is the number of a database, such as /0")
            if not parts.hostname:
                raise ValueError("it names no host")
            # Its types say that any answer may be anything.
            self._client: Any = redis.Redis(
                host=parts.hostname,
                port=6379 if parts.port is None else parts.port,
                db=int(parts.path[1:] or 0),
                username=parts.username,
                password=parts.password,
                ssl=parts.scheme == "rediss",
                socket_connect_timeout=_CONNECT_S,
                socket_timeout=_ANSWER_S,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise UserError(f"{self._shown}: {error}; a store is redis://HOST:PORT/DATABASE?prefix=NAME") from None
        self._prefix = prefix.encode() + b":"
        self._users = self._prefix + b"users"
        self._replace = self._client.register_script(_REPLACE)
        super().__init__(self._shown, columns, keep)

    def __len__(self) -> int:
        return self._asked(lambda: int(self._client.zcard(self._users)))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _read(self, key: bytes) -> bytes | None:
        content: bytes | None = self._asked(lambda: self._client.get(self._prefix + key))
        return content

    def _keys(self, start: bytes, count: int) -> list[bytes]:
        span = {"bylex": True, "offset": 0, "num": count}
        return self._asked(lambda: list(self._client.zrange(self._users, b"[" + start, b"+", **span)))

    def _change(self, keys: Sequence[bytes], change: Change) -> None:
        until = time.monotonic() + _PATIENCE_S
        while keys:
            names = [self._prefix + key for key in keys]
            contents: list[bytes | None] = self._asked(partial(self._client.mget, names))
            changed: dict[bytes, tuple[bytes | None, bytes]] = {}
            for key, former in zip(keys, contents, strict=True):
                content = change(key, former)
                if content is not None:
                    changed[key] = (former, content)
            written = self._asked(partial(self._write, changed))
            # Others have changed these meanwhile.
            keys = [key for key, done in zip(changed, written, strict=True) if not done]
            if keys and time.monotonic() > until:
                raise StoreError(f"{self._shown}: others change the same users all the time; try again")
            if keys:
                time.sleep(random.uniform(0, 0.005))

    def _write(self, changed: dict[bytes, tuple[bytes | None, bytes]]) -> list[int]:
        if not changed:
            return []
        with self._client.pipeline(transaction=False) as pipeline:
            for key, (former, content) in changed.items():
                digest = "" if former is None else hashlib.sha1(former).hexdigest()
                self._replace([self._prefix + key, self._users], [digest, content, key], client=pipeline)
            written: list[int] = pipeline.execute()
        return written

    def _create(self, description: bytes) -> None:
        self._asked(lambda: self._client.set(self._prefix + DESCRIPTION, description, nx=True))

    def _asked(self, ask: Callable[[], T]) -> T:
        """What the server answers.

        Raises:
            StoreError: it does not, or refuses.
            UserError: it has something else under these keys.
        """
        try:
            return ask()
        except redis.RedisError as error:
            # Of a command in a pipeline, its whole text stands in front of the reason.
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if isinstance(error, redis.ResponseError) and "WRONGTYPE" in reason:
                raise UserError(
                    f"{self._shown}: no store of histories: keys of this prefix hold something else; choose another one"
                ) from None
            if isinstance(error, redis.AuthenticationError) or "authenticat" in reason.lower():
                raise StoreError(
                    f"{self._shown}: the store wants a password, or another one; give redis://USER:PASSWORD@HOST:PORT/0"
                ) from None
            raise StoreError(f"{self._shown}: the store is down, or refuses: {reason:.300}") from None
