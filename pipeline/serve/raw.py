"""Raw values of a request as Arrow arrays, and where in the request a wrong one stands.

N = values of a column.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import date
from itertools import chain
from numbers import Integral, Real
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.ingest.conversion import converted, reads
from pipeline.ingest.values import WrongValueError
from pipeline.serve.columns import RequestColumn
from schemas.errors import RequestError, printable

Place = Callable[[int], str]
"""Says where the value of an index stands, for messages: ``history.item_id[3]``."""


def is_listed(values: object) -> bool:
    """Whether a value is a list of values, rather than one value."""
    return isinstance(values, list | tuple | np.ndarray | pa.Array | pa.ChunkedArray)


def arrow_array(values: Any, name: str, place: Place) -> pa.Array:
    """Values of a column as an array of the type that they have.

    Args:
        values: a list or tuple, or an array of numpy's or Arrow's.
        name: of the column, for messages.
        place: of a value.

    Raises:
        RequestError: no list, or values that no type has all of.
    """
    if isinstance(values, pa.ChunkedArray):
        return values.combine_chunks()
    if isinstance(values, pa.Array):
        return values
    if not is_listed(values) or (isinstance(values, np.ndarray) and values.ndim != 1):
        raise RequestError(f"{name} is {said(values)}; give a list of values")
    kinds = _types(values)
    if UUID in kinds:
        values = [str(value) if isinstance(value, UUID) else value for value in values]
    try:
        # Arrow would take truth for numbers, and texts for bytes.
        mixed = len(kinds) > 1 and any(issubclass(kind, bool | np.bool_ | bytes) for kind in kinds)
        array = None if mixed else pa.array(values)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        array = None
    if array is None:
        index, why = _first_odd(values)
        raise RequestError(f"{place(index)} is {said(values[index])}, {why}")
    return array


def _types(values: Any) -> set[type]:
    """Types of values, or of those in lists, that are there; nothing of arrays, which have one type."""
    if isinstance(values, np.ndarray) and values.dtype != np.object_:
        return set()
    kinds = set(map(type, values)) - {type(None)}
    if kinds and kinds <= {list, tuple}:
        kinds = set(map(type, chain.from_iterable(each for each in values if each is not None))) - {type(None)}
    return kinds


def typed(column: RequestColumn, values: Any, name: str, place: Place, forms: set[str]) -> pa.Array:
    """Values of a column in the type that a data set is made of, null where one is missing.

    Args:
        column: what they are.
        values: of the request.
        name: of the column, for messages.
        place: of a value.
        forms: which forms of times there were is added.

    Raises:
        RequestError: a value that no rule reads.
    """
    raw = arrow_array(values, name, place)
    if not reads(column.read, raw.type, column.unit):
        index = int(np.argmax(raw.is_valid().to_numpy(zero_copy_only=False)))
        raise RequestError(f"{place(index)} is {said(raw[index].as_py())}, which is not {_wanted(column)}")
    try:
        array, found = converted(column.read, raw, column.unit, column.zone)
    except WrongValueError as wrong:
        raise RequestError(f"{place(wrong.index)}: {wrong}") from None
    forms.update(found)
    return array


def require_all(values: pa.Array, place: Place) -> None:
    """Refuse a column with a missing value."""
    if values.null_count:
        raise RequestError(f"{place(pc.index(values.is_null(), True).as_py())} is missing")


def require_range(values: pa.Array, largest: int, place: Place, why: str) -> None:
    """Refuse integers below 0 or above ``largest``."""
    outside = pc.or_(pc.less(values, 0), pc.greater(values, largest))
    index = pc.index(outside, True).as_py()
    if index >= 0:
        raise RequestError(f"{place(index)} is {values[index].as_py()}, {why}")


def columns_of(
    candidates: Sequence[Mapping[str, Any]], known: Sequence[RequestColumn], most: int
) -> dict[str, list[Any]]:
    """Candidates as columns.

    Args:
        candidates: a mapping of column to value each.
        known: columns that they may have.
        most: how many there may be.

    Returns:
        The columns that any of them has; None where one lacks a column that is not required.

    Raises:
        RequestError: too many candidates, or one that is no mapping, has an unknown column, or lacks a required one.
    """
    if not isinstance(candidates, Sequence) or isinstance(candidates, str | bytes):
        raise RequestError(f"candidates is {said(candidates)}; give a list of candidates")
    if len(candidates) > most:
        raise RequestError(
            f"{len(candidates):,} candidates; at most {most:,} are scored at once: send several requests"
        )
    names = {column.name for column in known}
    required = {column.name for column in known if column.required}
    needed = {column.name for column in known if column.role in ("item", "timestamp")}
    given: dict[str, None] = {}
    looked_at: set[frozenset[str]] = set()
    for index, candidate in enumerate(candidates):
        if not isinstance(candidate, Mapping):
            raise RequestError(f"candidates[{index}] is {said(candidate)}; give its columns by name")
        keys = frozenset(candidate)
        if keys in looked_at:
            continue
        looked_at.add(keys)
        check_names(f"candidates[{index}]", keys, names, required, needed)
        given |= dict.fromkeys(candidate)
    return {name: [candidate.get(name) for candidate in candidates] for name in given}


def check_names(where: str, given: frozenset[str], known: set[str], required: set[str], needed: set[str]) -> None:
    """Refuse unknown columns, and the lack of required ones.

    Args:
        where: they are, for messages.
        given: names of those that are there.
        known: names of all that may be there.
        required: names of those that must be there.
        needed: names of those all of whose values must be known, too.
    """
    if unknown := sorted(map(str, given - known)):
        raise RequestError(f"{where}: no column {said(unknown[0])}; there are {', '.join(sorted(known))}")
    if lacking := sorted(required - given):
        # Left out by mistake, or unknown: nobody could tell.
        how = "" if lacking[0] in needed else "; give it, with null for a value that is unknown"
        raise RequestError(f"{where}: column {lacking[0]} is missing{how}")


def _first_odd(values: Any) -> tuple[int, str]:
    """Index of the first value that does not go with those before it, and why."""
    first: tuple[str, Any] | None = None
    for index, value in enumerate(values):
        if value is None:
            continue
        try:
            pa.array([value])
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            return index, "which is no value that a log can have"
        kind = _kind(value)
        if first is not None and kind != first[0]:
            return index, f"{kind} where others are {first[0]}"
        if first is None:
            first = (kind, value)
    return 0, "which does not go with the other values"


def _kind(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "true or false"
    if isinstance(value, Integral | Real):
        return "a number"
    if isinstance(value, str | UUID):
        return "text"
    if is_listed(value):
        inner = next((each for each in value if each is not None), None)
        return "a list" if inner is None else f"a list of {_kind(inner).removeprefix('a ')}"
    return "a date" if isinstance(value, date) else type(value).__name__


def _wanted(column: RequestColumn) -> str:
    if column.read.several and column.read.separator is None:
        return f"a list of values of type {column.read.kind}"
    if column.read.kind == "time":
        return f"a time ({column.unit})"
    return {"integer": "an integer", "number": "a number"}.get(column.read.kind, "text")


def said(value: object) -> str:
    """A value as a message shows it, in one line."""
    said = repr(value)
    if "\n" in said:
        # A table, an array; a text's own lines are escaped by now.
        return f"of type {type(value).__name__}"
    said = printable(said)
    return said if len(said) <= 60 else f"{said[:60]}..."
