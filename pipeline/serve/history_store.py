"""A store of histories: the last N events of every user, raw as in the log, in an embedded database or in Redis.

A store knows its columns and its N from the day that it was made. Events may arrive in any order and again: what counts
is which there are, and when they were.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

from pydantic import Field

from pipeline.serve.stored_columns import Events, StoredColumns, UserId, as_list
from pipeline.serve.stored_record import Merged, Record, decoded, encoded, merged, user_key, user_of
from schemas.documents import json_document, parse_json
from schemas.errors import UserError
from schemas.settings import Settings, validated

KEEP = 10_000
"""Events that a new store keeps of each user, if nothing else is said."""
FORMAT = 1
"""Which records a store has under which keys."""
DESCRIPTION = b"\x00store"
"""The key of what a store says of itself; users' keys begin with other bytes."""

Change = Callable[[bytes, bytes | None], bytes | None]
"""Makes the record of a key of the one that is there; None: leave it as it is."""


class StoreSettings(Settings):
    """What a store says of itself."""

    format: int
    keep: Annotated[int, Field(ge=1, le=10_000_000)]
    """Events of each user, the last ones by time."""
    columns: StoredColumns


class Appended(int):
    """How many of the events that arrived are new; and what became of the others."""

    known: int
    """Were there already."""
    not_kept: int
    """Are older than the last N of their user, and so not taken."""
    filtered: int
    """Have none of the values in ``events.keep``, and are no events here."""

    @classmethod
    def of(cls, results: Sequence[Merged], filtered: int) -> Self:
        """The sums over users."""
        appended = cls(sum(each.new for each in results))
        appended.known = sum(each.known for each in results)
        appended.not_kept = sum(each.not_kept for each in results)
        appended.filtered = filtered
        return appended


class HistoryStore(ABC):
    """The histories of users; `pipeline.serve.store.open_store` opens one.

    Args:
        url: of the store, for messages.
        columns: what a new store has; one that is there must have the same. None: those that it has.
        keep: events of each user in a new store; one that is there must keep as many. None: what it keeps.
    """

    def __init__(self, url: str, columns: StoredColumns | None, keep: int | None) -> None:
        self.url = url
        self.settings = self._agreed(columns, keep)
        self.columns = self.settings.columns
        self.keep = self.settings.keep

    def append(self, user: object, events: Mapping[str, Any]) -> Appended:
        """Add events of a user. An event that is there already, equal in all columns, is the same event.

        When it returns, the events are on the disk; when it fails, none of them is in the store.

        Args:
            user: raw id.
            events: column -> a value of each event, in any order of time; of users' features, column -> the value.

        Returns:
            How many are new.

        Raises:
            RequestError: something is wrong with the user or the events.
            StoreError: the store is down.
            OSError: the disk is full or broken.
        """
        return self.merge([(self.columns.user_id(user), self.columns.events(events))])

    def merge(self, parts: Sequence[tuple[UserId, Events]], *, repeats: bool = False) -> Appended:
        """Add events of several users, each of whom is there once; errors are those of `append`.

        Args:
            parts: user and events, as `StoredColumns` reads them.
            repeats: an event that comes twice among those of a user is two, as ``dare prepare`` counts it.
        """
        of_key = {user_key(user): (user, events) for user, events in parts}
        assert len(of_key) == len(parts)
        results: dict[bytes, Merged] = {}

        def change(key: bytes, content: bytes | None) -> bytes | None:
            user, events = of_key[key]
            fresh: bytes | None = None
            if repeats:
                # A log that is loaded again finds what it has made.
                result = merged(Record(), events, self.columns, self.keep, repeats=True)
                fresh = encoded(key, user, result.record, self.columns)
                if content is None or content == fresh:
                    results[key] = result if content is None else Merged(result.record, 0, result.new, result.not_kept)
                    return None if content == fresh else fresh
            former = Record() if content is None else decoded(key, content, self.columns)
            results[key] = merged(former, events, self.columns, self.keep, repeats=repeats)
            after = encoded(key, user, results[key].record, self.columns)
            return None if after == content or (content is None and not _says_anything(results[key].record)) else after

        self._change(sorted(of_key), change)
        return Appended.of(list(results.values()), sum(events.filtered for _, events in parts))

    def history(self, user: object) -> dict[str, Any]:
        """The events of a user in order of time, as `append` takes them, with the id and what is known of the user.

        Equal timestamps are in their order of arrival. A user who is unknown has no events: all lists are empty.

        Raises:
            RequestError: no id of a user.
            StoreError: the store is down.
            UserError: the record is damaged, or of another version.
        """
        parsed = self.columns.user_id(user)
        key = user_key(parsed)
        content = self._read(key)
        record = Record() if content is None else decoded(key, content, self.columns)
        return {
            self.columns.user: parsed,
            self.columns.timestamp: self.columns.timestamps(record.moment.tolist()),
            **{column.name: as_list(record.behaviors.get(column.name, [])) for column in self.columns.behaviors},
            **{name: value for name, (_, value) in record.user.items()},
        }

    def size(self, user: object) -> int:
        """Bytes of the record of a user; 0 if there is none."""
        return len(self._read(user_key(self.columns.user_id(user))) or b"")

    def users(self, first: object = None, count: int = 100) -> list[UserId]:
        """Some ids of users in the store's order, integers by their size and texts by their bytes.

        Args:
            first: id to begin with, whether it is there or not; None: the first one of all.
            count: at most so many.
        """
        start = b"\x01" if first is None else user_key(self.columns.user_id(first))
        return [user_of(key, partial(self._record_of, key)) for key in self._keys(start, count)]

    def _record_of(self, key: bytes) -> bytes:
        return self._read(key) or b""

    @abstractmethod
    def __len__(self) -> int:
        """Number of users."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the store; what was appended is in it already."""

    @abstractmethod
    def _read(self, key: bytes) -> bytes | None:
        """The bytes under a key; None: there are none."""

    @abstractmethod
    def _keys(self, start: bytes, count: int) -> list[bytes]:
        """Keys of users from ``start`` on, in order, at most ``count``."""

    @abstractmethod
    def _change(self, keys: Sequence[bytes], change: Change) -> None:
        """Change the bytes under each key as if nobody else did meanwhile; ``change`` may be called several times."""

    @abstractmethod
    def _create(self, description: bytes) -> None:
        """Write the store's description of itself, if there is none."""

    def require_columns(self, columns: StoredColumns) -> None:
        """Make sure that the store has these columns.

        Raises:
            UserError: it has others.
        """
        _require(self.url, self.columns, columns)

    def _agreed(self, columns: StoredColumns | None, keep: int | None) -> StoreSettings:
        """The settings of the store that is there, or those of a new one, which is made."""
        content = self._read(DESCRIPTION)
        if content is None:
            if columns is None:
                raise UserError(f"{self.url}: there is no store of histories; `dare store load` makes one")
            made = validated(StoreSettings, {"format": FORMAT, "keep": keep or KEEP, "columns": columns})
            self._create(json_document(made.model_dump_json()).encode())
            # Somebody may have made it at the same moment.
            content = self._read(DESCRIPTION)
            assert content is not None
        values, _ = parse_json(Path(self.url), content, "load the log into a new store")
        if values.get("format") != FORMAT:
            raise UserError(
                f"{self.url}: a store of format {values.get('format')}, and this program reads format {FORMAT}; use "
                "the program that made it"
            )
        settings = validated(StoreSettings, values)
        if keep is not None and keep != settings.keep:
            raise UserError(
                f"{self.url}: it keeps the last {settings.keep:,} events of a user, not {keep:,}; load the log into a "
                "new store to keep another number"
            )
        if columns is not None:
            _require(self.url, settings.columns, columns)
        return settings

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def printable_url(url: str) -> str:
    """A URL without the password that may be in it."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _require(url: str, there: StoredColumns, wanted: StoredColumns) -> None:
    for name, mine in wanted:
        if mine != getattr(there, name):
            raise UserError(
                f"{url}: it has {name}={_names(getattr(there, name))}, and {_names(mine)} is wanted; load the log "
                "into a new store"
            )


def _says_anything(record: Record) -> bool:
    return bool(len(record.moment) or record.user or record.floor is not None)


def _names(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return ", ".join(f"{each.name} ({each.kind})" for each in value) or "none"
