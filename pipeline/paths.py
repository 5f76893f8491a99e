"""What a person names on the command line or in settings, and which files that is."""

import errno
import glob
import logging
import os
import re
from importlib.util import find_spec
from pathlib import Path

from schemas.errors import UserError
from schemas.storage import RemotePath

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_MAGIC = re.compile(r"[*?\[]")
_LOGGER = logging.getLogger("dare.paths")


def location(name: str) -> Path:
    """The path that a person named, of this machine or, where it is a URL, of remote storage.

    Raises:
        UserError: it is empty, or a URL that names no place.
    """
    if _URL.match(name) and name.partition(":")[0].lower() != "file":
        return RemotePath(name)
    return local_path(name)


def local_path(name: str) -> Path:
    """The path of this machine that a person named.

    Raises:
        UserError: it is a URL, which would otherwise become a local folder of that name (``s3:``), or empty.
    """
    scheme, separator, rest = name.partition(":/")
    if scheme.lower() == "file" and separator:
        return Path("/" + rest.lstrip("/"))
    if _URL.match(name):
        # A `Path` has lost one of the two slashes.
        raise UserError(
            f"{scheme}://{rest.lstrip('/')}: a path of this machine is wanted here, not a URL; data sets, runs and "
            "logs may be at one"
        )
    if not name:
        raise UserError("a path is empty: is a variable of the shell not set?")
    if "\0" in name:
        raise UserError(f"{name!r}: no path has a zero byte in it")
    return Path(name)


def _require_utf8(name: str) -> None:
    # Manifests and records have names in them, as UTF-8.
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise UserError(f"{os.fsencode(name)!r}: the name is not UTF-8; rename it")


def input_files(role: str, names: tuple[str, ...]) -> tuple[Path, ...]:
    """The files that a person named, each once, sorted by path.

    A name is an existing file; a folder, all of whose files are meant, at any depth; a pattern; or
    ``package:NAME/path``, a file inside an installed Python package. In folders and patterns, names that begin with
    ``_`` or ``.`` are left out: markers and checksums of Spark and Hadoop. All but the last may be a URL.

    Args:
        role: what the files are, for messages.
        names: at least one.

    Raises:
        UserError: a name stands for no file, or its store cannot be reached.
    """
    chosen: dict[Path, Path] = {}
    twice: list[Path] = []
    hidden: list[Path] = []
    for name in names:
        # By the file itself: links and other ways to write a path would count its lines twice.
        named = _files_of(role, name, hidden)
        twice += [path for path in named if chosen.setdefault(path.resolve(), path) is not path]
    for left_out, why in ((twice, "named more than once; read once"), (hidden, "names begin with _ or .; not read")):
        if left_out:
            more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
            _LOGGER.info("%s: %s%s: %s", role, left_out[0], more, why)
    # By name, so that the order in which files were named changes nothing.
    return tuple(sorted(chosen.values()))


def _files_of(role: str, name: str, hidden: list[Path]) -> list[Path]:
    if name.startswith("package:"):
        return [_in_package(role, name)]
    _require_utf8(name)
    path = location(name)
    if isinstance(path, RemotePath):
        return _remote_files(role, path, hidden)
    # What is there comes first: a file may have brackets or a star in its name.
    if path.is_file():
        return [path]
    if path.is_dir():
        entries = _below(path)
        what = "a folder without files"
    else:
        # A pattern that ends at folders means what is in them, as Spark's own readers take it.
        matched = [Path(each) for each in sorted(glob.glob(str(path), recursive=True, include_hidden=True))]
        # ``**`` goes around in circles of links until the system refuses to.
        matched = [each for each in matched if "**" not in path.parts or not _is_circle(each)]
        entries = [file for each in matched for file in (_below(each) if each.is_dir() else [each])]
        what = "no such file" if not matched else "a pattern that matches folders without files"
    files: list[Path] = []
    for entry in entries:
        # Only below the folder that was named: the way to it may have any name.
        parts = entry.relative_to(path).parts if path.is_dir() else _matched_parts(path, entry)
        (hidden if any(part[0] in "_." for part in parts) else files).append(entry)
    if not files:
        raise UserError(f"{role}: {name}: {what}" + (" but ones that begin with _ or ." if entries else ""))
    for file in files:
        # A log that is passed over would be lost without a word, and a pipe would be waited for forever.
        _require_utf8(str(file))
        if not file.is_file():
            why = "is no file, but a pipe, socket or device" if file.exists() else "is a link to nothing"
            raise UserError(f"{role}: {file} {why}; logs are read from files: write it to one, or leave it out")
    return files


def _remote_files(role: str, path: RemotePath, hidden: list[Path]) -> list[Path]:
    if path.is_file():
        return [path]
    from fsspec.utils import glob_translate

    # One listing, of all below what the pattern spells out.
    base, match = path, None
    if not path.is_dir() and _MAGIC.search(path.url):
        while _MAGIC.search(base.url):
            base = base.parent
        # A pattern that ends at folders means what is in them.
        match = re.compile(glob_translate(path.url).removesuffix(r"\Z") + r"(?:/.*)?\Z", re.DOTALL)
    files: list[Path] = []
    matched = [file for file in base.files() if match is None or match.match(file.url)]
    for file in matched:
        parts = file.relative_to(base).parts if match is None else _matched_parts(path, file)
        (hidden if any(part[0] in "_." for part in parts) else files).append(file)
    if not files:
        what = "no such file, and no folder with files"
        raise UserError(f"{role}: {path}: {what}" + (" but ones that begin with _ or ." if matched else ""))
    return files


def _below(folder: Path, above: frozenset[str] = frozenset()) -> list[Path]:
    """All that a folder holds at any depth, except folders; links to folders are followed, but not in circles.

    Args:
        folder: where to look.
        above: real paths of the folders that led to it.
    """
    here = os.path.realpath(folder)
    if here in above:
        return []
    files: list[Path] = []
    for entry in sorted(folder.iterdir()):
        files += _below(entry, above | {here}) if entry.is_dir() else [entry]
    return files


def _is_circle(path: Path) -> bool:
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def _matched_parts(pattern: Path, entry: Path) -> tuple[str, ...]:
    """Parts of a path that a pattern left open: not those that the pattern spells out."""
    spelled = set(pattern.parts)
    return tuple(part for part in entry.parts if part not in spelled)


def _in_package(role: str, name: str) -> Path:
    package, _, inside = name.removeprefix("package:").partition("/")
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):  # the name is not one of a package, or of one inside a module
        spec = None
    if spec is None or spec.origin is None:
        raise UserError(f"{role}: the Python package {package} is not installed; run `make setup`")
    path = Path(spec.origin).parent / inside
    if not path.is_file():
        raise UserError(f"{role}: {name}: the package has no such file")
    return path
