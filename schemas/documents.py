"""Documents that carry a checksum of themselves, so that damage on a disk is found before their content is used.

A JSON document begins with its checksum, a YAML document ends with it, in a comment; a line of a log of steps ends with
it. The checksum is of the bytes on disk beside it: whoever changes a document by hand takes the checksum out.
"""

import hashlib
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any

from schemas.errors import UserError
from schemas.storage import RemotePath

_JSON = re.compile(rb'\A\{\s*"checksum": "([0-9a-f]{64})",?\s*')
_YAML = re.compile(rb"^# checksum: ([0-9a-f]{64})\n\Z", re.MULTILINE)
_LINE = re.compile(rb', "crc32": "([0-9a-f]{8})"\}\Z')
_CROSSED = re.compile(rb'"crc32": "[0-9a-f]{8}"\}.', re.DOTALL)
"""A whole line of a log, and more: what was its end of line is damaged."""

RESTORE = "restore it from a copy, or, if you have changed it yourself, take its checksum out"
"""What to do about a document that differs from its checksum, where nothing better can be said."""

_NOTICES = logging.getLogger("dare.documents")


def json_document(text: str) -> str:
    """Return the text of a JSON object with the checksum of its own as its first member."""
    rest = text[1:].lstrip(" \n")
    # Laid out as the rest: one line, or a member a line.
    gap = text[1 : len(text) - len(rest)]
    comma = "" if rest.startswith("}") else ", " if not gap else f",{gap}"
    return f'{{{gap}"checksum": "{hashlib.sha256(rest.encode()).hexdigest()}"{comma}{rest}'


def yaml_document(text: str) -> str:
    """Return a YAML text with a last line that is a comment, the checksum of what is before it."""
    return f"{text}# checksum: {hashlib.sha256(text.encode()).hexdigest()}\n"


def json_line(content: Mapping[str, Any]) -> str:
    """Return a JSON object as a line of a log, which ends with the CRC-32 of what is before it."""
    text = json.dumps(content)[:-1]
    return f'{text}, "crc32": "{zlib.crc32(text.encode()):08x}"}}\n'


def read_json(
    path: Path,
    keys: Mapping[str, type | UnionType] | None = None,
    remedy: str = RESTORE,
    *,
    part_of: Path | None = None,
) -> dict[str, Any]:
    """Read a JSON document, without its checksum.

    A document without a checksum is one of an earlier version of this program; a notice says so once.

    Args:
        path: of the file.
        keys: that the document must have, with the types of their values.
        remedy: what to do about a damaged document.
        part_of: folder that the notice names; None: the document's own.

    Raises:
        UserError: it is missing, cannot be read, is damaged, or lacks a key.
    """
    content, has_checksum = parse_json(path, read_bytes(path), remedy)
    if not has_checksum:
        notice_unverified(part_of or path.parent)
    for key, kind in (keys or {}).items():
        if key not in content:
            raise UserError(f"{path} is damaged (no {key}); {remedy}")
        if not isinstance(content[key], kind):
            raise UserError(f"{path} is damaged ({key} is {content[key]!r:.40}); {remedy}")
    return content


def read_bytes(path: Path) -> bytes:
    """Read a file whole.

    Raises:
        UserError: it is missing, or cannot be read.
    """
    try:
        # A pipe would be waited for.
        if not isinstance(path, RemotePath) and path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{path} is no regular file")
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def is_named(path: Path) -> bool:
    """Whether something has this name, be it a link that leads nowhere."""
    return path.exists() if isinstance(path, RemotePath) else os.path.lexists(path)


def parse_json(path: Path, text: bytes, remedy: str = RESTORE) -> tuple[dict[str, Any], bool]:
    """Verify and parse the text of a JSON document.

    Returns:
        The document without its checksum, and whether it has one.

    Raises:
        UserError: it is damaged, or not such a document.
    """
    has_checksum = _verified(path, text, _JSON, remedy)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        content, why = None, str(error)
    else:
        why = "not a JSON object"
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged ({why}); {remedy}")
    # A checksum in another place than where this program writes it: somebody's tool has written the file again.
    if (content.pop("checksum", None) is not None) != has_checksum:
        raise UserError(f"{path} differs from its checksum; {remedy}")
    return content, has_checksum


def verify_yaml(path: Path, text: bytes) -> bool:
    """Compare a YAML document with its checksum.

    Returns:
        Whether it has one.

    Raises:
        UserError: it differs from it.
    """
    return _verified(path, text, _YAML, RESTORE)


def _verified(path: Path, text: bytes, checksum: re.Pattern[bytes], remedy: str) -> bool:
    found = checksum.search(text)
    if found is None:
        return False
    # Of a JSON document what is behind the checksum, of a YAML document what is before it.
    rest = text[found.end() :] if checksum is _JSON else text[: found.start()]
    if hashlib.sha256(rest).hexdigest() != found[1].decode():
        raise UserError(f"{path} differs from its checksum; {remedy}")
    return True


def log_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Read the whole lines of a log that `json_line` has written, each as it stands in the file and as JSON.

    Half a line at the end, which is just being written or was when its writer was killed, is left out.

    Returns:
        The lines in order, without the member ``crc32``; none if there is no file.

    Raises:
        UserError: a line is damaged.
    """
    if not is_named(path):
        return []
    *lines, last = read_bytes(path).split(b"\n")
    remedy = "restore it from a copy, or remove it, and it begins anew"
    if _CROSSED.search(last):
        raise UserError(f"{path} is damaged (its last line does not end); {remedy}")
    parsed = []
    for line in lines:
        found = _LINE.search(line)
        if found is None:
            notice_unverified(path.parent)
        elif f"{zlib.crc32(line[: found.start()]):08x}" != found[1].decode():
            raise UserError(f"{path} is damaged ({line[:40]!r} differs from its checksum); {remedy}")
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error}); {remedy}") from None
        if not isinstance(content, dict) or not isinstance(content.get("step"), int):
            raise UserError(f"{path} is damaged ({line[:40]!r} is not of a step); {remedy}")
        content.pop("crc32", None)
        parsed.append((line + b"\n", content))
    return parsed


def notice_unverified(folder: Path) -> None:
    """Say once that files of a folder have no checksums, and are used all the same."""
    _notice(_WHOLE.get() or folder)


@contextmanager
def one_notice(folder: Path) -> Iterator[None]:
    """Within the block, notices name this folder: many runs of an earlier version that are listed get one line."""
    former = _WHOLE.set(folder)
    try:
        yield
    finally:
        _WHOLE.reset(former)


_WHOLE: ContextVar[Path | None] = ContextVar("_WHOLE", default=None)


@cache
def _notice(folder: Path) -> None:
    _NOTICES.warning(
        "%s: files that an earlier version of this program wrote have no checksums; used without being verified", folder
    )


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file of a folder by the name that a list of its files has for it.

    Raises:
        UserError: the name, or a link of that name, leads to a place outside of the folder.
    """
    path = folder / name
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise UserError(f"{folder}: its list of files names {name!r}, which is not a file of this folder")
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path} is a link that leads outside of its folder; put the file itself there")
    return path
