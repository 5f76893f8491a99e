"""A folder that appears whole or not at all."""

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from schemas.errors import UserError


@contextmanager
def output_folder(out: Path, contents: Collection[str], *, overwrite: bool) -> Iterator[Path]:
    """A folder beside ``out`` to write into; takes the place of ``out`` if the block ends well, goes away if it fails.

    What a killed run left behind is removed by the next one. Entries that begin with a dot are removed at the end.

    Args:
        out: the folder.
        contents: patterns of the names that such a folder holds; with others in it, it is never overwritten.
        overwrite: ``out`` may hold an earlier output.

    Raises:
        UserError: ``out`` is not empty (unless ``overwrite``) or not an earlier output, or another process writes it.
    """
    out = out.absolute()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out names a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out} is not empty; choose another folder or pass --overwrite")
    if out.is_dir():
        foreign = sorted(path.name for path in out.iterdir() if not any(path.match(name) for name in contents))
        if foreign:
            raise UserError(f"{out} holds {foreign[0]!r}, which this command did not write; choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, former = (out.with_name(f".{out.name}.{state}") for state in ("partial", "former"))
    partial.mkdir(exist_ok=True)
    with _locked(partial, out):
        try:
            _empty(partial)
            shutil.rmtree(former, ignore_errors=True)
            yield partial
            for hidden in partial.glob(".*"):
                shutil.rmtree(hidden)
            if out.exists():
                out.rename(former)
            partial.rename(out)
        finally:
            for left in (partial, former):
                shutil.rmtree(left, ignore_errors=True)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def check_output_file(path: Path) -> None:
    """Make sure that a file can be written, before there is anything to write. Its folder is made.

    Raises:
        UserError: it cannot.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


@contextmanager
def _locked(partial: Path, out: Path) -> Iterator[None]:
    """Hold the lock on a folder; the kernel lets go of it when the process dies."""
    handle = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The folder may have been renamed or removed by its owner between our opening and locking it.
        if not partial.exists() or not os.path.samestat(os.fstat(handle), partial.stat()):
            raise BlockingIOError
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"another process is writing {out}; wait for it or stop it") from None
    try:
        yield
    finally:
        os.close(handle)


def write_whole(path: Path, content: str) -> None:
    """Write a file that is there with all its content, or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(content)
    temporary.rename(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON document of a run.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (not a JSON object)")
    return content
