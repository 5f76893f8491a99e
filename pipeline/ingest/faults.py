"""What is wrong with an input, in one line that names the file and, for text, the line."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from pipeline.ingest.sources import LogFiles, corrupt
from schemas.errors import UserError

_TYPES = {"int64": "BIGINT", "string": "VARCHAR", "timestamp": "TIMESTAMP"}
_KINDS = {"BIGINT": "an integer", "TIMESTAMP": "a date and time"}


def csv_options(files: LogFiles) -> dict[str, Any]:
    """Arguments of DuckDB's CSV reader that leave nothing for it to guess."""
    return {
        "header": files.header,
        "columns": {name: _TYPES[kind] for name, kind in files.columns.items()},
        "delim": files.delimiter,
        "quote": '"',
        "escape": '"',
        "auto_detect": False,
    }


def explain(error: duckdb.Error, inputs: list[LogFiles]) -> str:
    """DuckDB's error as one line for whoever gave the input."""
    text = str(error)
    if "No space left" in text:
        return "no space left on the output's disk; free some or choose another --out"
    # A CSV fault names file and line itself. For Parquet DuckDB's words say little, so the files are read once more.
    line = re.search(r"CSV Error on Line: (\d+)", text)
    if line:
        return _csv_fault(text, int(line[1]))
    for files in inputs:
        for path, reason in corrupt(files).items():
            return f"{files.role}: {path}: corrupt ({reason}); repair it, leave it out, or set on_corrupt=skip"
    return " ".join(text.split())


def first_fault(files: LogFiles) -> str | None:
    """Read the files to find what another engine stumbled over; None: they can be read."""
    if files.format == "parquet":
        # An empty error matches no message: what is found is a damaged file, or nothing.
        return explain(duckdb.Error(), [files]) or None
    # An aggregate of every column makes DuckDB convert every value.
    columns = ", ".join(f'max("{name}")' for name in files.columns)
    with duckdb.connect() as connection:
        try:
            _lines(connection, files, files.paths, csv_options(files)["columns"]).aggregate(columns).fetchall()
        except duckdb.Error as error:
            return explain(error, [files])
    return None


def refuse_fractions(files: LogFiles) -> None:
    """Look through a CSV log for numbers that are no integers; DuckDB would round them, and ids could merge.

    Raises:
        UserError: names the file, the line, the column and the value.
    """
    types = dict.fromkeys(files.columns, "VARCHAR")
    # Most logs have no number with a point or an exponent: only where one does, each number is looked at.
    suspect = "coalesce(bool_or(contains(\"{0}\", '.') OR contains(\"{0}\", 'e') OR contains(\"{0}\", 'E')), false)"
    # What is no number at all is none of this function's business: the reader refuses it, with the line.
    fraction = 'min("{0}") FILTER (try_cast("{0}" AS DOUBLE) % 1 <> 0)'
    with duckdb.connect() as connection:

        def aggregated(path: Path, columns: list[str], expression: str) -> dict[str, Any]:
            """The aggregate of each column for which it is neither null nor false."""
            if not columns:
                return {}
            lines = _lines(connection, files, [path], types)
            try:
                row = lines.aggregate(", ".join(expression.format(name) for name in columns)).fetchone()
            except duckdb.Error as error:
                raise UserError(explain(error, [files])) from None
            return {name: value for name, value in zip(columns, row or (), strict=True) if value}

        integers = [name for name, kind in files.columns.items() if kind == "int64"]
        for path in files.paths:
            for name, value in aggregated(path, list(aggregated(path, integers, suspect)), fraction).items():
                line = _line_of(files, path, name, value)
                raise UserError(f"{path}, line {line}: column {name}: {value!r} is not an integer; correct the file")


def _lines(
    connection: duckdb.DuckDBPyConnection, files: LogFiles, paths: Sequence[Path], types: dict[str, str]
) -> duckdb.DuckDBPyRelation:
    """The lines of CSV files. DuckDB's Python API has other names for the options than its SQL."""
    options = csv_options(files)
    return connection.read_csv(
        [str(path) for path in paths],
        header=options["header"],
        columns=types,
        delimiter=options["delim"],
        quotechar=options["quote"],
        escapechar=options["escape"],
        auto_detect=options["auto_detect"],
    )


def _line_of(files: LogFiles, path: Path, column: str, value: str) -> int:
    """Number of the first line that has the value in the column."""
    index = list(files.columns).index(column)
    with pa.input_stream(str(path), compression="detect") as stream:
        rows = csv.reader(io.TextIOWrapper(stream, newline=""), delimiter=files.delimiter)
        return next(rows.line_num for row in rows if row and row[index] == value)


def _csv_fault(text: str, line: int) -> str:
    """One line with file and line number, made of DuckDB's words on a CSV line that it cannot read."""
    file = re.search(r"^\s*file = (.*)$", text, re.MULTILINE)
    where = f"{file[1] if file else 'input'}, line {line}"
    converted = re.search(r'converting column "(.*?)"\. Could not convert string "(.*?)" to \'(\w+)\'', text)
    if converted:
        kind = _KINDS.get(converted[3], converted[3])
        hint = "correct the file, or set timestamp_unit or text_category if the column is of another kind"
        return f"{where}: column {converted[1]}: {converted[2]!r} is not {kind}; {hint}"
    columns = re.search(r"Expected Number of Columns: (\d+) Found: (\d+)", text)
    if columns:
        return f"{where}: {columns[2]} columns, {columns[1]} are expected; correct the file or the settings' columns"
    reasons = [part for part in text.splitlines()[1:] if part and not part.startswith("Original Line")]
    return f"{where}: {reasons[0] if reasons else 'cannot be read'}"
