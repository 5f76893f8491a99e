"""Lines of a log's files as columns of known types, each file read from its first byte to its last.

One reader for every engine, so that a value means the same whatever computes with it. It says where a value stands that
no rule reads, and counts the lines that the settings leave out.

N = lines of a batch.
"""

import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import is_refusal
from pipeline.ingest import conversion, times, values
from pipeline.ingest.columns import FEATURE_KEY, USER_NUMBER, Column, feature_column
from pipeline.ingest.sources import LogFiles, fields, first_line, lines_of, plain_text
from pipeline.ingest.text import ByteStream
from pipeline.ingest.text_codes import TextCodes
from pipeline.ingest.values import WrongValueError
from schemas.errors import UserError
from schemas.shards import RECORDS_OF_A_FILE
from schemas.storage import arrow_file

READ, FILTERED, OUTSIDE_TIME = "read", "filtered", "outside_time"
"""Keys of a tally: lines in the files, and of those the ones that ``keep``, and ``since`` and ``until``, leave out."""

_BLOCK = 8 << 20
"""Bytes of text that are parsed at a time."""
_ROWS = 200_000
"""Rows of Parquet that are read at a time."""

T = TypeVar("T")

Tally = Counter[str]
ReportBytes = Callable[[int], object]
"""Called with the number of bytes of a file that are read since the last call."""


def schema_of(files: LogFiles, *, coded: bool = False) -> pa.Schema:
    """Schema of what `read_file` yields: the columns by their new names, and ``line`` where lines are numbered.

    Args:
        files: the log.
        coded: codes take the place of texts, and of `USER_NUMBER`, which is the user's code then.
    """
    fields = [
        pa.field(column.name, pa.int64() if coded and column.coded else column.type)
        for column in files.columns
        if not (coded and column.name == USER_NUMBER)
    ]
    return pa.schema([*fields, pa.field("line", pa.int64())] if files.numbered else fields)


def text_column(files: LogFiles, name: str) -> str:
    """The column whose texts those of a column of a log are: ids in a file of features are items or users."""
    return f"{files.role.removesuffix('s')}_id" if name == FEATURE_KEY else name


def read_file(
    files: LogFiles, index: int, tally: Tally, report: ReportBytes, codes: TextCodes | None = None
) -> Iterator[pa.RecordBatch]:
    """Read a file of a log to its end.

    Args:
        files: the log.
        index: which of its files.
        tally: counts are added to it while batches are taken: `READ`, `FILTERED`, `OUTSIDE_TIME`, and ``local`` and
            ``zoned``, batches with times that have no offset, and that have one.
        report: told about progress.
        codes: gives numbers that take the place of texts; None: texts stay.

    Yields:
        Batches of `schema_of`, without the lines that are left out.

    Raises:
        UserError: a line that cannot be read, or a file that is damaged; names the file, and the line if it can.
    """
    record = 1
    for batch in _batches(files, index, files.needed, report, () if codes is None else _dictionaries(files)):
        record_N = np.arange(record, record + len(batch))
        record += len(batch)
        yield _typed(files, index, batch, record_N, tally, codes)


def raw_batches(files: LogFiles, index: int) -> Iterator[pa.RecordBatch]:
    """Read all columns of a file of a log as they stand, every line of it; errors are those of `read_file`."""
    names = files.text_columns or tuple(pq.read_schema(arrow_file(files.paths[index])).names)
    return _batches(files, index, names, lambda _: None)


def _batches(
    files: LogFiles, index: int, columns: tuple[str, ...], report: ReportBytes, dictionaries: Collection[str] = ()
) -> Iterator[pa.RecordBatch]:
    """Some columns of a file, by their names in it: text as it stands, Parquet in its types.

    Columns of Parquet in ``dictionaries`` come dictionary-encoded.
    """
    path = files.paths[index]
    if files.format == "text":
        return ahead(_text_batches(files, path, columns, report))
    return ahead(_parquet_batches(files, path, columns, report, dictionaries))


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield what an iterator yields; the next item is fetched in a thread while the present one is worked on."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item


def _dictionaries(files: LogFiles) -> list[str]:
    """Columns of a Parquet file, by their names in it, whose texts come again and again: each is looked at once."""
    others = set(files.keep)
    for column in files.columns:
        # Nearly every line of a piece has a user or an item of its own.
        if not column.coded or column.several or not column.name.startswith(feature_column("")):
            others.add(column.source)
    return [source for source in files.needed if source not in others]


def _typed(
    files: LogFiles,
    index: int,
    batch: pa.RecordBatch,
    record_N: NDArray[np.int64],
    tally: Tally,
    codes: TextCodes | None,
) -> pa.RecordBatch:
    """Columns by their new names and types; lines that the settings leave out are counted and gone."""

    def converted(column: Column, codes: TextCodes | None) -> pa.Array:
        # Whoever parses text looks at that.
        utf8 = files.format == "text"
        raw = batch.column(column.source)
        try:
            if codes is None or not column.coded:
                return _converted(files, column, raw, tally)
            texts = _converted(files, column, raw, tally) if column.several else values.repeated_texts(raw, utf8=utf8)
            return codes.code(text_column(files, column.name), texts)
        except WrongValueError as wrong:
            where = _where(files, files.paths[index], int(record_N[wrong.index]))
            raise UserError(f"{where}: column {column.source}: {wrong}; {column.remedy}") from None

    tally[READ] += len(batch)
    for source, kept in files.keep.items():
        # Before all other columns are read: what is filtered may hold whatever it likes.
        right = pc.is_in(converted(Column(source, source, "text"), None), pa.array(kept, pa.string()))
        tally[FILTERED] += len(batch) - (pc.sum(right).as_py() or 0)
        record_N = record_N[right.to_numpy(zero_copy_only=False)]
        batch = batch.filter(right)
    columns: dict[str, Any] = {}
    # Times first, because they too leave lines out.
    for column in sorted(files.columns, key=lambda column: column.kind != "time"):
        if codes is not None and column.name == USER_NUMBER:
            continue
        if column.kind in ("hour", "weekday"):
            columns[column.name] = times.clock(columns["timestamp"], files.zone, column.kind)
            continue
        columns[column.name] = converted(column, codes)
        if column.kind == "time" and not (files.since is None and files.until is None):
            inside = _inside(columns[column.name], files.since, files.until)
            tally[OUTSIDE_TIME] += len(batch) - (pc.sum(inside).as_py() or 0)
            columns[column.name] = columns[column.name].filter(inside)
            record_N = record_N[inside.to_numpy(zero_copy_only=False)]
            batch = batch.filter(inside)
    if files.numbered:
        columns["line"] = pa.array(index * RECORDS_OF_A_FILE + record_N, pa.int64())
    schema = schema_of(files, coded=codes is not None)
    return pa.record_batch([columns[name] for name in schema.names], schema=schema)


def _converted(files: LogFiles, column: Column, raw: pa.Array, tally: Tally) -> pa.Array:
    typed, forms = conversion.converted(column, raw, files.unit, files.zone)
    tally.update(forms)
    return typed


def _inside(time: pa.Array, since: int | None, until: int | None) -> pa.Array:
    """Whether times are within bounds; what has no time stays, to be told of later."""
    inside = pc.greater_equal(time, -(2**63) if since is None else since)
    if until is not None:
        inside = pc.and_(inside, pc.less(time, until))
    return pc.fill_null(inside, True)


def _text_batches(
    files: LogFiles, path: Path, columns: tuple[str, ...], report: ReportBytes
) -> Iterator[pa.RecordBatch]:
    # Columns that are not wanted may share a name, or have none: all go by their numbers here.
    numbers = [str(index) for index in range(len(files.text_columns))]
    number = dict(zip(files.text_columns, numbers, strict=True))
    needed = {number[name]: name for name in columns}
    try:
        with arrow_file(path) as raw, plain_text(files, path, raw) as stream:
            checked = _CheckedText(stream, files, path)
            reader = pyarrow.csv.open_csv(
                pa.PythonFile(checked, "r"),
                pyarrow.csv.ReadOptions(block_size=_BLOCK, column_names=numbers, skip_rows=int(files.header)),
                pyarrow.csv.ParseOptions(
                    delimiter=files.separator,
                    quote_char=files.quote or False,
                    double_quote=True,
                    escape_char=False,
                    newlines_in_values=False,
                    ignore_empty_lines=True,
                ),
                pyarrow.csv.ConvertOptions(
                    check_utf8=True,
                    column_types=dict.fromkeys(needed, pa.string()),
                    include_columns=list(needed),
                    strings_can_be_null=False,
                ),
            )
            done = 0
            for batch in reader:
                yield batch.rename_columns(list(needed.values()))
                report(raw.tell() - done)
                done = raw.tell()
    except (OSError, pa.ArrowException) as error:
        if is_refusal(error):
            raise
        raise UserError(_text_fault(files, path, error)) from None


class _CheckedText(io.RawIOBase):
    """Passes the bytes of a text file on, having made sure that quotes and ends of lines in it mean what they say.

    A quoted value is a whole value, doubles the quotes in it and ends on its line. Readers take anything else as they
    like: with one stray quote they swallow lines until the next.
    """

    def __init__(self, stream: ByteStream, files: LogFiles, path: Path) -> None:
        super().__init__()
        self._stream, self._path, self._lines_done, self._rest = stream, path, 0, b""
        self._quote = (files.quote or "").encode()
        self._well_formed = _well_formed(files.separator, files.quote) if files.quote else None

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        block: bytes = self._stream.read(size)
        text = self._rest + block
        # All whole lines, and at the end of the file what is left.
        end = text.rfind(b"\n") + 1 if block else len(text)
        if self._well_formed is not None and text.find(self._quote, 0, end) >= 0:
            good = self._well_formed.match(text, 0, end)
            if good is None or good.end() < end:
                line = self._line(text, 0 if good is None else good.end())
                raise UserError(
                    f"{self._path}, line {line}: a quote {self._quote.decode()} is not closed on its line, or text "
                    "stands behind it; if quotes are ordinary characters of this log, set quote=null for it"
                )
        # Arrow ends a record at one, as old systems did: half a line would become a record.
        if text.find(b"\r", 0, end) >= 0 and (lone := _LONE_RETURN.search(text, 0, end)) is not None:
            raise UserError(
                f"{self._path}, line {self._line(text, lone.start())}: a carriage return within the line; records end "
                "in a line feed, so take it out"
            )
        # Several times as fast as `bytes.count`.
        self._lines_done += int(np.count_nonzero(np.frombuffer(text, np.uint8, end) == _LINE_FEED))
        self._rest = text[end:]
        return block

    def _line(self, text: bytes, position: int) -> int:
        """Number of the line in which a position of the present text is."""
        return self._lines_done + text.count(b"\n", 0, position) + 1


_LINE_FEED = ord("\n")
_LONE_RETURN = re.compile(rb"\r(?!\r*(?:\n|\Z))")


def _well_formed(delimiter: str, quote: str) -> re.Pattern[bytes]:
    """What matches all well-formed lines from the start of a text; possessive, so that it never goes back."""
    d, q = re.escape(delimiter.encode()), re.escape(quote.encode())
    value = (
        rb"(?:" + q + rb"(?:[^" + q + rb"\n]++|" + q + q + rb")*+" + q + rb"|[^" + q + d + rb"\n][^" + d + rb"\n]*+|)"
    )
    line = value + rb"(?:" + d + value + rb")*+\r?+"
    return re.compile(rb"(?:" + line + rb"\n)*+(?:" + line + rb"\Z)?+")


def _text_fault(files: LogFiles, path: Path, error: BaseException) -> str:
    """What is wrong with a text file that Arrow could not read, found by going through its lines once more."""
    expected = len(files.text_columns)
    try:
        for number, line in enumerate(lines_of(files, path), 1):
            where = f"{path}, line {number}"
            if len(line) >= _BLOCK:
                return f"{where}: longer than {_BLOCK >> 20} MiB; is it a line of a log?"
            try:
                text = line.decode()
            except UnicodeDecodeError as wrong:
                return f"{where}: byte {wrong.start + 1} is not UTF-8; convert the file"
            if not text or (number == 1 and files.header):
                continue
            columns = len(fields(files, text))
            if columns != expected:
                return f"{where}: {columns} columns, {expected} are expected; correct the file or the settings' columns"
    except (OSError, pa.ArrowException) as damage:
        return f"{files.role}: {path}: damaged or cut off ({first_line(damage)}); get the whole file again"
    except csv.Error as wrong:
        return f"{where}: {wrong}"
    return f"{files.role}: {path}: cannot be read ({first_line(error)})"


def _parquet_batches(
    files: LogFiles, path: Path, columns: tuple[str, ...], report: ReportBytes, dictionaries: Collection[str]
) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(
            arrow_file(path), page_checksum_verification=True, read_dictionary=list(dictionaries)
        ) as parquet:
            rows, size = max(parquet.metadata.num_rows, 1), path.stat().st_size
            for batch in parquet.iter_batches(_ROWS, columns=list(columns)):
                yield batch
                report(size * len(batch) // rows)
    except (OSError, pa.ArrowException) as error:
        if is_refusal(error):
            raise
        raise UserError(
            f"{files.role}: {path}: corrupt ({first_line(error)}); repair it, leave it out, or set on_corrupt=skip"
        ) from None


def _where(files: LogFiles, path: Path, record: int) -> str:
    """Where a record stands, for people: its line in a text file, empty lines and the header counted."""
    if files.format == "parquet":
        return f"{path}, row {record}"
    lines = (number for number, line in enumerate(lines_of(files, path), 1) if line)
    return f"{path}, line {next(itertools.islice(lines, record - 1 + files.header, None))}"
