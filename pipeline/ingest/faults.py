"""What is wrong with an input, in one line that names the file and, for text, the line."""

import re
from typing import Any

import duckdb

from pipeline.ingest.sources import Files, corrupt

_TYPES = {"int64": "BIGINT", "string": "VARCHAR", "timestamp": "TIMESTAMP"}
_KINDS = {"BIGINT": "an integer", "TIMESTAMP": "a date and time"}


def csv_options(files: Files) -> dict[str, Any]:
    """Arguments of DuckDB's CSV reader that leave nothing to guess."""
    return {
        "header": files.header,
        "columns": {name: _TYPES[kind] for name, kind in files.columns.items()},
        "delim": files.delimiter,
        "quote": '"',
        "escape": '"',
        "auto_detect": False,
    }


def explain(error: duckdb.Error, inputs: list[Files]) -> str:
    """DuckDB's error as one line for whoever gave the input."""
    text = str(error)
    if "No space left" in text:
        return "no space left on the output's disk; free some or choose another --out"
    line = re.search(r"CSV Error on Line: (\d+)", text)
    if line:
        return _csv_fault(text, int(line[1]))
    for files in inputs:
        for path, reason in corrupt(files).items():
            return f"{files.role}: {path}: corrupt ({reason}); repair it, leave it out, or set on_corrupt=skip"
    return " ".join(text.split())


def first_fault(files: Files) -> str | None:
    """Read the files to find what another engine stumbled over; None: they can be read."""
    if files.format == "parquet":
        return explain(duckdb.Error(), [files]) or None
    columns = ", ".join(f'max("{name}")' for name in files.columns)
    with duckdb.connect() as connection:
        try:
            connection.read_csv([str(path) for path in files.paths], **csv_options(files)).aggregate(columns).fetchall()
        except duckdb.Error as error:
            return explain(error, [files])
    return None


def _csv_fault(text: str, line: int) -> str:
    """DuckDB's words on a CSV line that it cannot read, as one line with file and line number."""
    file = re.search(r"^\s*file = (.*)$", text, re.MULTILINE)
    where = f"{file[1] if file else 'input'}, line {line}"
    converted = re.search(r'converting column "(.*?)"\. Could not convert string "(.*?)" to \'(\w+)\'', text)
    if converted:
        kind = _KINDS.get(converted[3], converted[3])
        return f"{where}: column {converted[1]}: {converted[2]!r} is not {kind}; correct the file"
    columns = re.search(r"Expected Number of Columns: (\d+) Found: (\d+)", text)
    if columns:
        return f"{where}: {columns[2]} columns, {columns[1]} are expected; correct the file or the settings' columns"
    reasons = [part for part in text.splitlines()[1:] if part and not part.startswith("Original Line")]
    return f"{where}: {reasons[0] if reasons else 'cannot be read'}"
