"""Input files of a log: globs, formats, and the type that each column must have, before any engine reads them."""

import glob
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import UserError
from schemas.prepare import Events, Impressions, ItemFeatures

_CSV = (".csv", ".csv.gz", ".csv.zst", ".txt", ".tsv")


@dataclass(frozen=True)
class LogFiles:
    """Files of one log, which share a format and columns."""

    role: str
    """What the log is, for messages: events, impressions, items."""
    paths: tuple[Path, ...]
    format: Literal["csv", "parquet"]
    columns: dict[str, str]
    """Every column of a CSV, in order, or those of Parquet that are needed: to "int64", "string" or "timestamp"."""
    header: bool
    """CSV files begin with a line of column names."""
    delimiter: str
    skipped: tuple[str, ...] = ()
    """Corrupt Parquet files that were left out, with the reason."""


def log_files(role: str, log: Events | Impressions, *, skip_corrupt: bool) -> LogFiles:
    """The files of a log of behaviours or impressions.

    Raises:
        UserError: a file or column is missing, of another type, or corrupt (unless ``skip_corrupt``).
    """
    numeric = log.timestamp_unit != "datetime"
    wanted = {log.user_id: "int64", log.item_id: "int64", log.timestamp: "int64" if numeric else "timestamp"}
    if log.category_id is not None:
        wanted[log.category_id] = "string" if log.text_category else "int64"
    if log.scene is not None:
        wanted[log.scene] = "string"
    if isinstance(log, Events) and log.behavior is not None:
        wanted[log.behavior] = "string"
    if isinstance(log, Impressions):
        wanted[log.label] = "int64"
        if log.split is not None:
            wanted[log.split] = "string"
    # A column that only filters has the type of the settings, text, unless it is needed as something else.
    for column in log.keep:
        wanted.setdefault(column, "string")
    return _files(role, log.files, wanted, log.header, log.file_columns, log.delimiter, skip_corrupt)


def feature_files(features: ItemFeatures, *, text_category: bool, skip_corrupt: bool) -> LogFiles:
    """The files that say each item's category.

    Raises:
        UserError: as ``log_files``.
    """
    wanted = {features.item_id: "int64", features.category_id: "string" if text_category else "int64"}
    return _files("items", features.files, wanted, True, None, ",", skip_corrupt)


def corrupt(files: LogFiles) -> dict[Path, str]:
    """Parquet files whose needed columns cannot be read to the end, with the reason. Reads everything."""
    reasons = {}
    for path in files.paths if files.format == "parquet" else ():
        try:
            with pq.ParquetFile(path) as parquet:
                for _ in parquet.iter_batches(columns=list(files.columns)):
                    pass
        except (OSError, pa.ArrowException) as error:
            reasons[path] = _first_line(error)
    return reasons


def _files(
    role: str,
    patterns: tuple[str, ...],
    wanted: dict[str, str],
    header: bool,
    file_columns: tuple[str, ...] | None,
    delimiter: str,
    skip_corrupt: bool,
) -> LogFiles:
    paths = tuple(path for pattern in patterns for path in _expand(role, pattern))
    parquet = [path for path in paths if path.suffix in (".parquet", ".parq", ".pq")]
    other = [path for path in paths if path not in parquet]
    if parquet and other:
        raise UserError(f"{role}: {parquet[0]} is Parquet and {other[0]} is not; give files of one format")
    if parquet:
        return _parquet_files(role, paths, wanted, skip_corrupt)
    for path in paths:
        if not path.name.lower().endswith(_CSV):
            raise UserError(f"{role}: {path}: unknown format; files end in {', '.join(_CSV)} or .parquet")
    names = _csv_columns(role, paths, header, file_columns, delimiter)
    _require(role, paths[0], wanted, names)
    columns = {name: wanted.get(name, "string") for name in names}
    return LogFiles(role, paths, "csv", columns, header, delimiter)


def _parquet_files(role: str, paths: tuple[Path, ...], wanted: dict[str, str], skip_corrupt: bool) -> LogFiles:
    good, skipped = [], []
    for path in paths:
        try:
            # The footer alone; whether the rest can be read shows later, or below where corrupt files are left out.
            schema = pq.read_schema(path)
        except (OSError, pa.ArrowException) as error:
            if not skip_corrupt:
                raise UserError(
                    f"{role}: {path}: not a readable Parquet file ({_first_line(error)}); "
                    "repair it, leave it out, or set on_corrupt=skip"
                ) from None
            skipped.append(f"{path}: {_first_line(error)}")
            continue
        _require(role, path, wanted, schema.names)
        for name, kind in wanted.items():
            if not _fits(schema.field(name).type, kind):
                raise UserError(f"{role}: {path}: column {name} is {schema.field(name).type}, {kind} is needed")
        good.append(path)
    files = LogFiles(role, tuple(good), "parquet", wanted, True, ",")
    if skip_corrupt:
        # A footer may be whole and a page not: to leave files out beforehand, all of them are read to the end.
        bad = corrupt(files)
        good = [path for path in good if path not in bad]
        skipped += [f"{path}: {reason}" for path, reason in bad.items()]
    if not good:
        raise UserError(f"{role}: no file can be read: {skipped[0]}")
    return LogFiles(role, tuple(good), "parquet", wanted, True, ",", tuple(skipped))


def _expand(role: str, pattern: str) -> list[Path]:
    """Files of a glob; ``package:NAME/path`` is a file inside an installed Python package."""
    if pattern.startswith("package:"):
        package, _, inside = pattern.removeprefix("package:").partition("/")
        try:
            spec = find_spec(package)
        except (ImportError, ValueError):  # the name is not one of a package, or of one inside a module
            spec = None
        if spec is None or spec.origin is None:
            raise UserError(f"{role}: the Python package {package} is not installed; run `make setup`")
        return [Path(spec.origin).parent / inside]
    # `glob` gives files in the order of the disk.
    paths = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
    if not paths:
        raise UserError(f"{role}: {pattern}: no such file")
    return paths


def _csv_columns(
    role: str, paths: tuple[Path, ...], header: bool, file_columns: tuple[str, ...] | None, delimiter: str
) -> list[str]:
    if header:
        heads = {path: _head(role, path).split(delimiter) for path in paths}
        names = [name.strip().strip('"') for name in heads[paths[0]]]
        for path, head in heads.items():
            if [name.strip().strip('"') for name in head] != names:
                raise UserError(f"{role}: {path} has other columns than {paths[0]}")
        if file_columns is not None and list(file_columns) != names:
            raise UserError(
                f"{role}: {paths[0]}: columns are {', '.join(names)}; {', '.join(file_columns)} are expected"
            )
        return names
    assert file_columns is not None, "settings are validated"
    for path in paths:
        _head(role, path)
    return list(file_columns)


def _head(role: str, path: Path) -> str:
    """First line of a CSV file, compressed or not."""
    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            head = stream.read(1 << 16)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{role}: {path}: cannot be read ({_first_line(error)})") from None
    if not head:
        raise UserError(f"{role}: {path} is empty")
    try:
        # ``utf-8-sig``: spreadsheets put a byte order mark in front, which would become part of the first name.
        return bytes(head).split(b"\n", 1)[0].rstrip(b"\r").decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{role}: {path}: not a text file") from None


def _require(role: str, path: Path, wanted: dict[str, str], names: list[str]) -> None:
    missing = sorted(set(wanted) - set(names))
    if missing:
        raise UserError(f"{role}: {path}: no column {', '.join(missing)}; it has {', '.join(names)}")


def _fits(actual: pa.DataType, kind: str) -> bool:
    types = pa.types
    if kind == "int64":
        return bool(types.is_integer(actual))
    if kind == "timestamp":
        return bool(types.is_timestamp(actual) or types.is_date(actual) or types.is_string(actual))
    return bool(types.is_string(actual) or types.is_large_string(actual) or types.is_integer(actual))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
