"""The models that answer, and how one takes the place of another without a request that is lost.

A request asks once which model answers, and keeps it to its end: the old model goes when its last request has.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.errors import description, printable
from schemas.errors import RequestError, UserError
from schemas.served import MODEL

if TYPE_CHECKING:
    from pipeline.serve.predictor import Predictor

_LOGGER = logging.getLogger("dare.serve")


class Seen(NamedTuple):
    """An exported folder as it was when somebody looked; it differs when anything in it has changed."""

    written: int
    """When its manifest was written, in nanoseconds since 1970."""
    folder: Path
    """Without links."""
    files: tuple[tuple[str, int, int, int], ...]
    """Name, inode, size and time of each file."""


def exports(folder: Path) -> list[Seen]:
    """Whole exports: the folder itself (or what it links to), or else those directly in it, the newest one first."""
    found = []
    # The manifest is written last: a folder without it is not whole.
    for path in [folder] if (folder / MODEL).exists() else _entries(folder):
        # A folder that is just being written, renamed or removed is none.
        with suppress(OSError):
            files = tuple(
                (str(file.relative_to(path)), status.st_ino, status.st_size, status.st_mtime_ns)
                for file in sorted(path.rglob("*"))
                if (status := file.stat())
            )
            found.append(Seen((path / MODEL).stat().st_mtime_ns, path.resolve(), files))
    return sorted(found, reverse=True)


def _entries(folder: Path) -> list[Path]:
    with suppress(OSError):
        return [path for path in folder.iterdir() if not path.name.startswith(".") and (path / MODEL).exists()]
    return []


class RefusedError(UserError):
    """A model cannot take the place of another; the one that was there answers on."""


class _Slot:
    """A model under a name, and where it comes from."""

    def __init__(self, name: str, given: Path) -> None:
        self.name = name
        self.given = given
        self.current: Predictor | None = None
        self.seen: Seen | None = None
        """The export that answers."""
        self.found: list[Seen] = []
        """All exports at the last look."""
        self.settled = False
        """Whether it was decided which of them answers."""
        self.refused: set[Seen] = set()


class Models:
    """Models by name, each of which can be replaced while it answers."""

    def __init__(self, folders: Sequence[Path], load: "Callable[[Path], Predictor]", root: Path | None) -> None:
        """Know where models are, without loading them.

        Args:
            folders: an exported folder each, a link to one, or a folder with some, of which the newest is taken.
            load: makes a predictor of an exported folder.
            root: folder below which further models may be loaded by path; None: no others.

        Raises:
            UserError: two have the same name, the last part of their paths.
        """
        names = [folder.name or str(folder) for folder in folders]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise UserError(f"two models are called {printable(name)}: give folders of different names")
        self._slots = {name: _Slot(name, folder) for name, folder in zip(names, folders, strict=True)}
        self._load = load
        self._root = root.resolve() if root else None
        self._loading = threading.Lock()

    def load_all(self) -> None:
        """Load what was given.

        Raises:
            UserError: a model cannot be loaded.
        """
        for slot in self._slots.values():
            self._load_newest(slot)

    @property
    def ready(self) -> bool:
        """Whether all models are loaded."""
        return all(slot.current for slot in self._slots.values())

    def all(self) -> "Mapping[str, Predictor]":
        """The models that answer now, by name; the first one is the first that was given."""
        return {name: slot.current for name, slot in self._slots.items() if slot.current}

    def one(self, name: str | None) -> "Predictor":
        """The model that answers a request that begins now.

        Args:
            name: of the model; None: the first one.

        Raises:
            RequestError: there is none of this name.
        """
        current = self._slot(name).current
        assert current, "requests are answered when all models are loaded"
        return current

    @property
    def folder(self) -> Path:
        """The export that the first model is."""
        seen = self._slot(None).seen
        assert seen
        return seen.folder

    def _slot(self, name: str | None) -> _Slot:
        if name is None:
            return next(iter(self._slots.values()))
        if name not in self._slots:
            raise RequestError(
                f"model: there is no {printable(name)}; here are {', '.join(map(printable, self._slots))}"
            )
        return self._slots[name]

    def replace(self, name: str | None, path: str | None) -> "tuple[str, Predictor]":
        """Load a model and let it take the place of another; all of it is read before.

        Args:
            name: of the model to replace; None: the first one.
            path: exported folder below the root; None: the folder that was given at the start, again.

        Returns:
            The name, and the model that answers now.

        Raises:
            RequestError: the path may not be loaded.
            RefusedError: the new model cannot be loaded, or is damaged; the old one answers on.
        """
        slot = self._slot(name)
        with self._loading:
            try:
                if path is None:
                    return slot.name, self._load_newest(slot, verify=True)
                return slot.name, self._take(slot, self._below_root(path), verify=True)
            except UserError as error:
                if isinstance(error, RequestError):
                    raise
                raise RefusedError(f"{error}; the model that was there answers on") from error

    def _below_root(self, path: str) -> Seen:
        if self._root is None:
            raise RequestError("path: this server loads no other folders; start it with --models DIR")
        if "\0" in path:
            raise RequestError("path: no path has a character of code 0")
        try:
            folder = (self._root / path).resolve()
            # What no disk may name is no export either.
            folder.exists()
        except (OSError, RuntimeError) as error:
            # A name that is too long, or links that lead in a circle.
            raise RequestError(f"path: {printable(path):.100} cannot be read: {description(error):.100}") from None
        if not folder.is_relative_to(self._root):
            raise RequestError(f"path: {printable(path)} is not below the folder of --models")
        if not (found := exports(folder)) or (found[0].folder != folder):
            raise RequestError(f"path: {printable(path)} is no exported model (no {MODEL})")
        return found[0]

    def _load_newest(self, slot: _Slot, verify: bool = False) -> "Predictor":
        """Load the newest export of a slot; while none answers yet, one before it if it is damaged.

        Raises:
            UserError: it cannot be loaded.
        """
        slot.found, slot.settled = exports(slot.given), True
        for seen in slot.found:
            try:
                return self._take(slot, seen, verify)
            except UserError as error:
                if slot.current or seen == slot.found[-1]:
                    raise
                _LOGGER.warning("%s is left out: %s", printable(seen.folder), description(error))
        # Whoever loads it says what is wrong with a folder without an export.
        return self._take(slot, Seen(0, slot.given, ()), verify)

    def _take(self, slot: _Slot, seen: Seen, verify: bool) -> "Predictor":
        begun = time.monotonic()
        try:
            new = self._load(seen.folder)
            if verify:
                new.verify()
            _warm(slot.name, new)
        except UserError:
            slot.refused.add(seen)
            raise
        slot.current, slot.seen = new, seen
        took = time.monotonic() - begun
        _LOGGER.info("%s: version %s answers, loaded in %.1f s", printable(slot.name), new.version, took)
        return new

    def close(self) -> None:
        """Let go of all models."""
        for slot in self._slots.values():
            slot.current = None

    def look(self) -> list[bool]:
        """Take exports that are newer than what answers, where they have stopped changing since the last look.

        Returns:
            Whether it answers now, of each that was tried; what was refused is tried again when something in it has
            changed. No error, which would keep the refused model in memory.
        """
        return [outcome for slot in self._slots.values() for outcome in self._look(slot)]

    def _look(self, slot: _Slot) -> Iterator[bool]:
        found = exports(slot.given)
        with self._loading:
            if found != slot.found:
                # Somebody may be copying it just now.
                slot.found, slot.settled = found, False
                return
            if slot.settled:
                return
            slot.settled = True
            for seen in found:
                if seen == slot.seen:
                    return
                if seen in slot.refused:
                    continue
                try:
                    self._take(slot, seen, verify=True)
                except UserError as error:
                    said = description(error)
                    _LOGGER.error(
                        "%s is refused, the model that was there answers on: %s", printable(seen.folder), said
                    )
                    yield False
                else:
                    yield True
                    return


def _warm(name: str, model: "Predictor") -> None:
    """Answer a made-up request, so that the first one of a sender is not slow.

    Raises:
        UserError: rows are damaged.
    """
    try:
        model.warm()
    except RequestError as error:
        # What can be asked of it is not known here; that it cannot be asked this is no reason not to answer.
        _LOGGER.warning("%s: the first request may be slow: %s", printable(name), description(error))
