"""A raw column of a log to the column that a data set is made of, by the rules of `pipeline.ingest.values`.

It knows no files and no engine, so that what answers requests reads a value as ``dare prepare`` does.
"""

from typing import assert_never

import pyarrow as pa

from pipeline.hashing import hash_values
from pipeline.ingest import times, values
from pipeline.ingest.columns import Column
from pipeline.ingest.sets import encoded_sets
from schemas.prepare import TimestampUnit


def converted(column: Column, raw: pa.Array, unit: TimestampUnit, zone: str | None) -> tuple[pa.Array, set[str]]:
    """A column of raw values in the type `Column.type`.

    Args:
        column: what it is read as; not the hour or the weekday, which are made of times.
        raw: (N,) as the log has them.
        unit: of times.
        zone: of times that carry none; see `pipeline.ingest.times.times`.

    Returns:
        (N,) values, null where one is missing, and of times which forms there were.

    Raises:
        WrongValueError: a value that no rule reads.
    """
    forms: set[str] = set()

    def scalars(raw: pa.Array) -> pa.Array:
        scalar, found = _scalars(column, raw, unit, zone)
        forms.update(found)
        return hash_values(scalar) if column.hashed else scalar

    return (encoded_sets(raw, column.separator, scalars) if column.several else scalars(raw)), forms


def _scalars(column: Column, raw: pa.Array, unit: TimestampUnit, zone: str | None) -> tuple[pa.Array, set[str]]:
    match column.kind:
        case "integer":
            return values.integers(raw), set()
        case "text":
            return values.texts(raw), set()
        case "number":
            return values.numbers(raw, negative=column.negative), set()
        case "label":
            return values.labels(raw), set()
        case "split":
            return values.splits(raw), set()
        case "hour" | "weekday":
            raise AssertionError("made from the line's time")
        case "time":
            return times.times(raw, unit, zone)
        case _:
            assert_never(column.kind)


def reads(column: Column, actual: pa.DataType, unit: TimestampUnit) -> bool:
    """Whether values of Arrow type ``actual`` can be read as ``column``."""
    if column.several and column.separator is None:
        inner = inner_type(actual)
        return pa.types.is_null(actual) if inner is None else values.fits(column.kind, inner, unit)
    return values.fits("text" if column.several else column.kind, actual, unit)


def inner_type(actual: pa.DataType) -> pa.DataType | None:
    """Type of a list's values; None: it is no list."""
    types = pa.types
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return actual.value_type if any(is_list(actual) for is_list in lists) else None
