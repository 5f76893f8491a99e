"""Input files of a log: which they are, their format, and what is read of them, before any engine starts."""

import csv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.ingest.columns import Column, file_columns, id_columns, roles
from pipeline.ingest.conversion import inner_type, reads
from pipeline.ingest.text import SEPARATOR, ByteStream, PlainText
from pipeline.paths import input_files
from schemas.errors import UserError
from schemas.features import UNCHANGED, FeatureFile, FeatureSettings
from schemas.prepare import Impressions, Log, PrepareSettings, TimestampUnit
from schemas.storage import arrow_file
from schemas.text_format import Encoding, TextFormat

_TEXT = (".csv", ".tsv", ".txt", ".dat")
_PACKED = ("", ".gz", ".zst")
_PARQUET = (".parquet", ".parq", ".pq")


@dataclass(frozen=True)
class LogFiles:
    """Files of one log, which share a format, and what is read of each of their lines."""

    role: str
    """What the log is, for messages: events, impressions, items, users."""
    paths: tuple[Path, ...]
    format: Literal["text", "parquet"]
    columns: tuple[Column, ...]
    keep: dict[str, tuple[str, ...]]
    """Column in the files -> texts: lines with another one are filtered."""
    unit: TimestampUnit = "s"
    zone: str | None = None
    """Zone of times that carry no offset; None: UTC."""
    since: int | None = None
    """Seconds; earlier lines are left out."""
    until: int | None = None
    """Seconds; these and later lines are left out."""
    text_columns: tuple[str, ...] = ()
    """Names of all columns of text files, in order."""
    header: bool = True
    """Text files begin with a line of column names."""
    delimiter: str = ","
    quote: str | None = '"'
    encoding: Encoding = "utf-8"
    numbered: bool = False
    """Lines carry a number that finds them again; see `pipeline.ingest.reading`."""
    number: int = 0
    """Tells apart several of one role."""
    skipped: tuple[str, ...] = ()
    """Corrupt Parquet files that were left out, with the reason."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the files, no two alike: with the folders in which they differ, where file names alone do not."""
        names = tuple(path.name for path in self.paths)
        if len(set(names)) == len(names):
            return names
        parts = [path.absolute().parts for path in self.paths]
        # How many folders above they share. Not `os.path.commonpath`: some may be URLs.
        shared = next(depth for depth, names in enumerate(zip(*parts, strict=False)) if len(set(names)) > 1)
        return tuple("/".join(each[shared:]) for each in parts)

    @property
    def separator(self) -> str:
        """The one character that stands between values once a file has passed through `plain_text`."""
        return self.delimiter if len(self.delimiter) == 1 else SEPARATOR

    @property
    def needed(self) -> tuple[str, ...]:
        """Names of the columns that are read, as the files have them, each once."""
        return tuple(dict.fromkeys([*(column.source for column in self.columns), *self.keep]))


@dataclass(frozen=True)
class FeatureFiles:
    """Files that say what belongs to items or users, a line each."""

    features: tuple[FeatureSettings, ...]
    """Those that are read of them, all of one side."""
    files: LogFiles


def log_files(role: str, log: Log, columns: tuple[Column, ...] | None = None, *, skip_corrupt: bool) -> LogFiles:
    """The files of a log of behaviours or impressions.

    Args:
        role: events or impressions.
        log: its settings.
        columns: what is read; None: user, item and time alone.
        skip_corrupt: leave out Parquet files that cannot be read.

    Raises:
        UserError: a file or column is missing, named twice, of another type, or corrupt (unless ``skip_corrupt``).
    """
    if log.files == (UNCHANGED,):
        # No file, so that no line comes.
        return LogFiles(role, (), "parquet", columns or (), {})
    return _files(role, log, id_columns(log) if columns is None else columns, skip_corrupt)


def feature_files(settings: PrepareSettings) -> list[FeatureFiles]:
    """The files that features of items and users have of their own, but `UNCHANGED` ones; errors as of `log_files`."""
    # Features of one file are read together.
    together: dict[tuple[str, tuple[str, ...], str | None, FeatureFile], list[FeatureSettings]] = {}
    for feature in settings.declared_features:
        if feature.file is not None:
            names = settings.files_of(feature)
            if names == (UNCHANGED,):
                continue
            together.setdefault((feature.of, names, feature.key, feature.file), []).append(feature)
    read = []
    for number, ((_, names, _, form), of_files) in enumerate(together.items()):
        features = tuple(of_files)
        log = Log(files=names, **form.model_dump(include=set(TextFormat.model_fields)))
        columns = file_columns(settings, features)
        files = _files(roles(features[0].of), log, columns, settings.on_corrupt == "skip")
        read.append(FeatureFiles(features, replace(files, number=number)))
    return read


def _files(role: str, log: Log, columns: tuple[Column, ...], skip_corrupt: bool) -> LogFiles:
    paths = input_files(role, log.files)
    parquet = [path for path in paths if path.suffix.lower() in _PARQUET]
    other = [path for path in paths if path not in parquet]
    if parquet and other:
        raise UserError(f"{role}: {parquet[0]} is Parquet and {other[0]} is not; give files of one format")
    files = LogFiles(
        role,
        paths,
        "parquet" if parquet else "text",
        columns,
        log.keep,
        log.timestamp_unit,
        log.timestamp_zone,
        log.since,
        log.until,
        header=log.header,
        quote=log.quote,
        encoding=log.encoding,
        numbered=isinstance(log, Impressions),
    )
    if parquet:
        return _parquet_files(files, skip_corrupt)
    return _text_files(files, log)


def _parquet_files(files: LogFiles, skip_corrupt: bool) -> LogFiles:
    good: list[Path] = []
    skipped: list[str] = []
    for path in files.paths:
        try:
            # The footer alone; whether the rest can be read shows later, or below where corrupt files are left out.
            schema = pq.read_schema(arrow_file(path))
        except (OSError, pa.ArrowException) as error:
            if not skip_corrupt:
                raise UserError(
                    f"{files.role}: {path}: not a readable Parquet file ({first_line(error)}); "
                    "repair it, leave it out, or set on_corrupt=skip"
                ) from None
            skipped.append(f"{path}: {first_line(error)}")
            continue
        if not good:
            files = _without_optional(files, schema.names)
        _require(files, path, schema.names)
        for column in (*(Column(name, name, "text") for name in files.keep), *files.columns):
            actual = schema.field(column.source).type
            if not reads(column, actual, files.unit):
                raise UserError(
                    f"{files.role}: {path}: column {column.source} is of the type {actual}, which cannot be read as "
                    f"{_wanted(column, actual, files.unit)}"
                )
        good.append(path)
    if skip_corrupt:
        # A footer may be whole and a page not: to leave files out beforehand, all of them are read to the end.
        bad = {path: reason for path in good if (reason := _damage(path, files.needed)) is not None}
        good = [path for path in good if path not in bad]
        skipped += [f"{path}: {reason}" for path, reason in bad.items()]
    if not good:
        raise UserError(f"{files.role}: no file can be read: {skipped[0]}")
    return replace(files, paths=tuple(good), skipped=tuple(skipped))


def _wanted(column: Column, actual: pa.DataType, unit: TimestampUnit) -> str:
    """What a column should be read as, and which setting reads it, for a message."""
    kind = f"{unit} times" if column.kind == "time" else f"{column.kind}s"
    if column.several and column.separator is None:
        return f"lists of {kind}; set the feature's separator if texts have several values"
    # Only columns of features are renamed so.
    is_feature = column.name.startswith("f_") and not column.several and column.kind != "number"
    return kind + ("; declare the feature with kind=ids" if inner_type(actual) is not None and is_feature else "")


def _without_optional(files: LogFiles, names: Iterable[str]) -> LogFiles:
    """The files without those columns that they may lack, and do."""
    present = set(names)
    columns = tuple(each for each in files.columns if not each.optional or each.source in present)
    return replace(files, columns=columns)


def _damage(path: Path, columns: tuple[str, ...]) -> str | None:
    """Why the needed columns of a Parquet file cannot be read to the end; None: they can."""
    try:
        with pq.ParquetFile(arrow_file(path), page_checksum_verification=True) as parquet:
            for _ in parquet.iter_batches(columns=list(columns)):
                pass
    except (OSError, pa.ArrowException) as error:
        return first_line(error)
    return None


def _text_files(files: LogFiles, log: Log) -> LogFiles:
    endings = {_ending(files.role, path) for path in files.paths}
    if log.delimiter is None and len(endings) > 1 and ".tsv" in endings:
        raise UserError(f"{files.role}: .tsv files and others in one log; set {files.role}.delimiter if it is the same")
    delimiter = log.delimiter or ("\t" if endings == {".tsv"} else ",")
    if delimiter == files.quote:
        raise UserError(f"{files.role}: delimiter and quote are both {delimiter!r}; they must differ")
    files = replace(files, delimiter=delimiter)
    names = log.file_columns
    if files.header:
        heads = {path: _names(files, path) for path in files.paths}
        first = files.paths[0]
        for path, head in heads.items():
            if head != heads[first]:
                raise UserError(f"{files.role}: {path} has other columns than {first}")
        if names is not None and names != heads[first]:
            raise UserError(
                f"{files.role}: {first}: columns are {', '.join(heads[first])}; {', '.join(names)} are expected"
            )
        names = heads[first]
    else:
        for path in files.paths:
            _head(files, path)
    assert names is not None, "settings are validated"
    files = _without_optional(files, names)
    for column in files.columns:
        if column.several and column.separator is None:
            raise UserError(
                f"{files.role}: {files.paths[0]}: a text file has no lists, as column {column.source} should; set the "
                "feature's separator to what stands between its values"
            )
    _require(files, files.paths[0], list(names))
    return replace(files, text_columns=names)


def _ending(role: str, path: Path) -> str:
    name = path.name.lower()
    for ending in _TEXT:
        if any(name.endswith(ending + packed) for packed in _PACKED):
            return ending
    kinds = f"{', '.join(_TEXT)} (also with {' or '.join(filter(None, _PACKED))} behind) or {_PARQUET[0]}"
    raise UserError(f"{role}: {path}: unknown format; names of files end in {kinds}")


def _names(files: LogFiles, path: Path) -> tuple[str, ...]:
    """Column names in the first line of a text file, without spaces around them."""
    try:
        return tuple(name.strip() for name in fields(files, _head(files, path)))
    except csv.Error as error:
        raise UserError(
            f"{files.role}: {path}, line 1: cannot be read ({error}); lines end in a line feed, with or without a "
            "carriage return before it"
        ) from None


def fields(files: LogFiles, line: str) -> list[str]:
    """The values of a line of a text file."""
    if files.quote is None:
        return line.split(files.separator)
    return next(csv.reader([line], delimiter=files.separator, quotechar=files.quote))


def _head(files: LogFiles, path: Path) -> str:
    """First line of a text file, compressed or not."""
    try:
        with arrow_file(path) as raw, plain_text(files, path, raw) as stream:
            head = stream.read(1 << 16)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{files.role}: {path}: cannot be read ({first_line(error)})") from None
    if not head:
        raise UserError(f"{files.role}: {path} is empty")
    try:
        # ``utf-8-sig``: spreadsheets put a byte order mark in front, which would become part of the first name.
        return bytes(head).split(b"\n", 1)[0].rstrip(b"\r").decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{files.role}: {path}: not a text file of UTF-8") from None


def _require(files: LogFiles, path: Path, names: list[str]) -> None:
    missing = sorted(set(files.needed) - set(names))
    if missing:
        raise UserError(f"{files.role}: {path}: no column {', '.join(missing)}; it has {', '.join(names)}")
    twice = [name for name in files.needed if names.count(name) > 1]
    if twice:
        raise UserError(f"{files.role}: {path}: more than one column is called {twice[0]}; rename all but one")


def first_line(error: BaseException) -> str:
    """The first line of what a library says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def plain_text(files: LogFiles, path: Path, raw: pa.NativeFile) -> Iterator[ByteStream]:
    """The text of an open file of a log, decompressed if its ending says so, in capitals or not; see `PlainText`."""
    # Read to its end, a compressed stream is checked against its length and checksum.
    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    with raw if codec is None else pa.CompressedInputStream(raw, codec) as stream:
        plain = files.encoding == "utf-8" and len(files.delimiter) == 1
        yield stream if plain else PlainText(stream, files.encoding, files.delimiter, path)


def lines_of(files: LogFiles, path: Path) -> Iterator[bytes]:
    """Lines of a text file, compressed or not, without their ends."""
    with arrow_file(path) as raw, plain_text(files, path, raw) as stream:
        rest = b""
        while block := stream.read(1 << 22):
            *lines, rest = (rest + block).split(b"\n")
            yield from (line.removesuffix(b"\r") for line in lines)
        if rest:
            yield rest.removesuffix(b"\r")
