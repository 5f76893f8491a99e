"""Raw values to columns of one type, by rules of this program: nothing is rounded, trimmed, wrapped or guessed.

A value is what a file says: text from CSV, or the declared type of a Parquet column. A text means the same in either
format and in every log; what no rule reads is refused. docs/data.md lists the rules.

N = values. Every function takes and returns an Arrow array of N values, where nulls and empty texts become nulls.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.prepare import TimestampUnit
from schemas.shards import SPLITS

_POINT, _SLASH, _NINE = np.frombuffer(b"./9", np.uint8)

Kind = Literal["integer", "text", "number", "time", "hour", "weekday", "label", "split"]

LONGEST_TEXT = 1 << 16
"""Bytes of the longest text that a value can be."""
_LARGEST_NUMBER = float(np.finfo(np.float32).max)
"""Models see numbers as float32."""

_CANONICAL = "^(?:0|-?[1-9][0-9]*)$"
_WHOLE_FLOAT = r"^(0|-?[1-9][0-9]{0,14})\.0+$"
"""How tables with missing values print integers. Up to 15 digits a float64 has kept all of them."""
_LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1} | {
    word: int(value) for value in (False, True) for word in (str(value), str(value).lower(), str(value).upper())
}
_NUMBER = r"^[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[Nn][Aa][Nn]|[Ii]nf(?:inity)?)$"


class WrongValueError(ValueError):
    """A value that no rule reads.

    Args:
        index: the value's index in its array.
        value: as the file has it.
        reason: what is wrong with it, in words that follow the value.
    """

    def __init__(self, index: int, value: object, reason: str) -> None:
        shown = repr(value)
        super().__init__(f"{shown if len(shown) <= 60 else shown[:60] + '...'} {reason}")
        self.index = index


def fits(kind: Kind, actual: pa.DataType, unit: TimestampUnit) -> bool:
    """Whether a Parquet column of type ``actual`` can be read as ``kind``."""
    types = pa.types
    if kind in ("hour", "weekday"):
        kind = "time"
    if types.is_dictionary(actual):
        return fits(kind, actual.value_type, unit)
    if is_text(actual) or types.is_null(actual):
        return True
    if is_binary(actual):
        return kind == "text"
    if kind == "time" and unit == "datetime":
        return bool(types.is_timestamp(actual) or types.is_date(actual))
    if types.is_integer(actual):
        return kind != "split"
    if types.is_boolean(actual):
        return kind in ("label", "text")
    return kind in ("integer", "number", "time", "label") and bool(
        types.is_floating(actual) or types.is_decimal(actual)
    )


def integers(values: pa.Array) -> pa.Array:
    """Integers of 64 bits.

    Text has no plus sign, no leading zeros, no exponent, no spaces; ``12.0`` is 12 up to 15 digits. Floats must be
    whole and so small that every integer up to them is a float too; NaN is missing.

    Raises:
        WrongValueError: anything else.
    """
    values = plain(values)
    if pa.types.is_floating(values.type):
        return _of_floats(values)
    if pa.types.is_boolean(values.type):
        raise AssertionError("booleans are no integers: see `fits`")
    if not is_text(values.type):
        return cast(values, _is_int64, "is not an integer of 64 bits")
    values = missing_as_null(values)
    # Almost every batch ends here. Arrow takes leading zeros, ``-0`` and hexadecimal digits too; the rules do not.
    odd = pc.any(pc.match_substring_regex(values, "^(?:0.|-0)")).as_py() if _has_zero_in_front(values) else False
    if not odd:
        try:
            return values.cast(pa.int64())
        except pa.ArrowInvalid:
            pass
    whole = pc.replace_substring_regex(values, _WHOLE_FLOAT, r"\1")
    require(values, pc.match_substring_regex(whole, _CANONICAL), _why_no_integer)
    return cast(whole, _is_int64, "does not fit an integer of 64 bits", said=values)


def texts(values: pa.Array, *, utf8: bool = False) -> pa.Array:
    """Text as it stands, every character of it; integers by their digits, booleans as ``true`` and ``false``.

    Binary values of a fixed width of 16 bytes are UUIDs (``8-4-4-4-12`` digits in small letters), all others are
    hexadecimal digits in small letters.

    Args:
        values: of any type that can be read as text.
        utf8: texts have been checked to be UTF-8.

    Raises:
        WrongValueError: a text longer than `LONGEST_TEXT`, or one that is no UTF-8.
    """
    values = plain(values)
    if is_binary(values.type):
        values = binary_texts(values)
    elif not is_text(values.type):
        values = values.cast(pa.string())
    elif not utf8:
        _require_utf8(values)
    values = missing_as_null(values)
    length = pc.binary_length(values)
    if (pc.max(length).as_py() or 0) > LONGEST_TEXT:
        require(values, pc.less_equal(length, LONGEST_TEXT), lambda _: "is longer than 64 KiB")
    return values


def repeated_texts(values: pa.Array, *, utf8: bool = False) -> pa.Array:
    """`texts`, of which dictionary-encoded ones stay so."""
    if not pa.types.is_dictionary(values.type):
        return texts(values, utf8=utf8)
    try:
        return pa.DictionaryArray.from_arrays(values.indices, texts(values.dictionary))
    except WrongValueError:
        # It may be one that no place has; if not, the first place that has it is to be named.
        return texts(values)


def numbers(values: pa.Array, *, negative: bool = True) -> pa.Array:
    """Numbers as float64, where NaN is missing and there is no negative zero.

    Args:
        values: numbers, or texts of decimal numbers, with or without an exponent.
        negative: whether numbers below 0 are right.

    Raises:
        WrongValueError: infinity, a number that no float32 holds, anything that is no number.
    """
    values = plain(values)
    number = missing_as_null(values) if is_text(values.type) else values
    if is_text(values.type):
        # Of digits and points alone Arrow reads what the rules do; the rules are asked about all else.
        if not _has_digits_and_points_alone(number):
            require(number, pc.match_substring_regex(number, _NUMBER), lambda _: "is not a number")
        number = cast(number, _is_float, "is not a number", kind=pa.float64())
    number = pc.add(number.cast(pa.float64(), safe=False), 0.0)
    number = pc.if_else(pc.is_nan(number), pa.scalar(None, pa.float64()), number)
    finite = pc.less_equal(pc.abs(number), _LARGEST_NUMBER)
    require(values, pc.fill_null(finite, True), lambda _: "is infinite, or too large for a float32")
    if not negative:
        require(values, pc.fill_null(pc.greater_equal(number, 0.0), True), lambda _: "is negative")
    return number


def labels(values: pa.Array) -> pa.Array:
    """Labels 0 and 1, int8: numbers, booleans, or ``true`` and ``false`` in any of their usual spellings.

    Raises:
        WrongValueError: anything else.
    """
    values = plain(values)
    if is_text(values.type):
        values = missing_as_null(values)
        index = pc.index_in(values, pa.array(list(_LABELS)))
        require(values, pc.is_valid(index), lambda _: "is no label; labels are 0 or 1")
        return pa.array(list(_LABELS.values()), pa.int8()).take(index)
    if pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
    if not pa.types.is_boolean(values.type):
        number = values.cast(pa.float64(), safe=False)
        right = pc.or_(pc.equal(number, 0), pc.equal(number, 1))
        require(values, right, lambda _: "is no label; labels are 0 or 1")
    return values.cast(pa.int8())


def splits(values: pa.Array) -> pa.Array:
    """Names of splits.

    Raises:
        WrongValueError: another word.
    """
    values = texts(values)
    right = pc.is_in(values, pa.array(list(SPLITS)))
    require(values, right, lambda _: f"is no split; splits are {', '.join(SPLITS)}")
    return values


def _of_floats(values: pa.Array) -> pa.Array:
    exact = 2 ** {16: 11, 32: 24, 64: 53}[values.type.bit_width]
    number = values.cast(pa.float64())
    number = pc.if_else(pc.is_nan(number), pa.scalar(None, pa.float64()), number)
    whole = pc.equal(pc.floor(number), number)
    require(values, pc.fill_null(pc.and_(whole, pc.is_finite(number)), True), lambda _: "is not an integer")
    small = pc.fill_null(pc.less(pc.abs(number), exact), True)
    require(values, small, lambda _: f"has lost digits: a {values.type} does not hold all integers of that size")
    return number.cast(pa.int64())


def cast(
    values: pa.Array,
    right: Callable[[Any], bool],
    reason: str,
    said: pa.Array | None = None,
    kind: pa.DataType | None = None,
) -> pa.Array:
    """Cast an array as a whole; if that fails, name its first value for which ``right`` does not hold."""
    try:
        return values.cast(kind or pa.int64())
    except pa.ArrowInvalid:
        for index, value in enumerate(values.to_pylist()):
            if value is not None and not right(value):
                raise WrongValueError(index, (values if said is None else said)[index].as_py(), reason) from None
        raise


def require(values: pa.Array, right: pa.Array, reason: Callable[[object], str]) -> None:
    """Raise for the first value that is not null and not right."""
    wrong = pc.and_kleene(pc.is_valid(values), pc.invert(pc.fill_null(right, False)))
    index = pc.index(wrong, True).as_py()
    if index >= 0:
        value = values[index].as_py()
        raise WrongValueError(index, value, reason(value))


def is_binary(kind: pa.DataType) -> bool:
    """Whether values of an Arrow type are bytes, UUIDs among them."""
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return bool(kind.extension_name == "arrow.uuid")
    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )


def binary_texts(values: pa.Array) -> pa.Array:
    """Bytes as hexadecimal digits, or as UUIDs where all have 16 of them by their type."""
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    uuids = pa.types.is_fixed_size_binary(values.type) and values.type.byte_width == 16
    missing = values.is_null()
    plain = values.cast(pa.binary()).fill_null(b"")
    _, offsets, content = plain.buffers()
    offset = np.frombuffer(offsets, np.int32)[plain.offset : plain.offset + len(plain) + 1].astype(np.int64)
    raw = np.frombuffer(content or b"", np.uint8)[offset[0] : offset[-1]]
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    text = np.stack([digits[raw >> 4], digits[raw & 15]], axis=1).reshape(-1)
    ends = 2 * (offset - offset[0])
    if uuids:
        # Dashes before the digits 8, 12, 16 and 20; a null has no digits.
        text = np.insert(text.reshape(-1, 32), (8, 12, 16, 20), ord("-"), axis=1).reshape(-1)
        ends = ends // 32 * 36
    texts = pa.StringArray.from_buffers(len(plain), pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(text))
    return pc.if_else(missing, pa.scalar(None, pa.string()), texts)


def _require_utf8(values: pa.Array) -> None:
    """Raise for the first text that is no UTF-8: a Parquet file may say of any bytes that they are text."""
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        for index, raw in enumerate(values.cast(pa.binary()).to_pylist()):
            try:
                (raw or b"").decode()
            except UnicodeDecodeError:
                raise WrongValueError(index, raw, "is not UTF-8") from None
        raise


def plain(values: pa.Array) -> pa.Array:
    """Dictionary-encoded values decoded, and all kinds of text as one."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_null(values.type) or (is_text(values.type) and values.type != pa.string()):
        values = values.cast(pa.string())
    return values


def missing_as_null(values: pa.Array) -> pa.Array:
    """Texts, with nulls in the place of empty ones."""
    shortest = pc.min(pc.binary_length(values)).as_py()
    return pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values) if shortest == 0 else values


def _has_digits_and_points_alone(values: pa.Array) -> bool:
    """Whether no text has another character."""
    _, offsets, content = values.buffers()
    if content is None or not len(values):
        return True
    offset = np.frombuffer(offsets, np.int32)
    first, end = int(offset[values.offset]), int(offset[values.offset + len(values)])
    character = np.frombuffer(content, np.uint8)[first:end]
    # What comes before the point wraps around to a large number; behind it stand the slash and the digits.
    return not ((character - _POINT > _NINE - _POINT) | (character == _SLASH)).any()


def _has_zero_in_front(values: pa.Array) -> bool:
    zero, minus = pc.starts_with(values, "0"), pc.starts_with(values, "-")
    return bool(pc.any(zero).as_py() or pc.any(minus).as_py())


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is one of Arrow's kinds of text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_int64(value: Any) -> bool:
    """Whether an integer as text, an integer or a decimal number is one of 64 bits."""
    if isinstance(value, str):
        # No more digits than an integer of 64 bits has: Python refuses to read thousands of them.
        return len(value) <= 20 and -(2**63) <= int(value) < 2**63
    return int(value) == value and -(2**63) <= int(value) < 2**63


def _is_float(text: object) -> bool:
    try:
        float(str(text))
    except ValueError:
        return False
    return True


def _why_no_integer(value: object) -> str:
    text = str(value)
    if text.lstrip("+-")[:1] == "0" and text.lstrip("+-").isdigit() and text.lstrip("+-") != "0":
        return "is not an integer: with its leading zeros it is text, and without them it could be another id"
    mantissa = text.lower().partition("e")[0].lstrip("+-").replace(".", "", 1)
    if "e" in text.lower() and mantissa.isdigit():
        return "is not an integer: a number with an exponent may have lost digits; export it with all of them"
    return "is not an integer"
