"""Raw values to columns of one type, by rules of this program: nothing is rounded, trimmed, wrapped or guessed.

A value is what a file says: text from CSV, or the declared type of a Parquet column. A text means the same in either
format and in every log; what no rule reads is refused. docs/data.md lists the rules.

N = values. Every function takes and returns an Arrow array of N values, where nulls and empty texts become nulls.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.prepare import TimestampUnit
from schemas.shards import SPLITS

Kind = Literal["integer", "text", "number", "time", "hour", "weekday", "label", "split"]

LONGEST_TEXT = 1 << 16
"""Bytes of the longest text that a value can be."""
_LARGEST_NUMBER = float(np.finfo(np.float32).max)
"""Models see numbers as float32."""

_CANONICAL = "^(?:0|-?[1-9][0-9]*)$"
_WHOLE_FLOAT = r"^(0|-?[1-9][0-9]{0,14})\.0+$"
"""How tables with missing values print integers. Up to 15 digits a float64 has kept all of them."""
_TIME = (
    r"^(?P<date>[0-9]{4}-[0-9]{2}-[0-9]{2})[ T](?P<time>[0-9]{2}:[0-9]{2}(?::[0-9]{2})?)(?:\.[0-9]+)?"
    r" ?(?P<zone>Z|[+-][0-9]{2}(?::?[0-9]{2})?)?(?P<utc>UTC)?$"
)
_ZONED = "[0-9]:[0-9]{2}.*(?:Z|UTC|[+-][0-9]{2}(?::?[0-9]{2})?)$"
_LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1} | {
    word: int(value) for value in (False, True) for word in (str(value), str(value).lower(), str(value).upper())
}
_NUMBER = r"^[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[Nn][Aa][Nn]|[Ii]nf(?:inity)?)$"
_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_LAST_DAY = np.array([0, 31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31])
"""Number of days of each month, in a year without a leap day."""


class WrongValueError(ValueError):
    """A value that no rule reads.

    Args:
        index: the value's index in its array.
        value: as the file has it.
        reason: what is wrong with it, in words that follow the value.
    """

    def __init__(self, index: int, value: object, reason: str) -> None:
        shown = repr(value)
        super().__init__(f"{shown if len(shown) <= 100 else shown[:100] + '...'} {reason}")
        self.index = index


def fits(kind: Kind, actual: pa.DataType, unit: TimestampUnit) -> bool:
    """Whether a Parquet column of type ``actual`` can be read as ``kind``."""
    types = pa.types
    if kind in ("hour", "weekday"):
        kind = "time"
    if types.is_dictionary(actual):
        return fits(kind, actual.value_type, unit)
    if _is_text(actual) or types.is_null(actual):
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
    values = _plain(values)
    if pa.types.is_floating(values.type):
        return _of_floats(values)
    if pa.types.is_boolean(values.type):
        raise AssertionError("booleans are no integers: see `fits`")
    if not _is_text(values.type):
        return _cast(values, _is_int64, "is not an integer of 64 bits")
    values = _missing_as_null(values)
    # Almost every batch ends here. Arrow takes leading zeros, ``-0`` and hexadecimal digits too; the rules do not.
    odd = pc.any(pc.match_substring_regex(values, "^(?:0.|-0)")).as_py() if _has_zero_in_front(values) else False
    if not odd:
        try:
            return values.cast(pa.int64())
        except pa.ArrowInvalid:
            pass
    whole = pc.replace_substring_regex(values, _WHOLE_FLOAT, r"\1")
    _require(values, pc.match_substring_regex(whole, _CANONICAL), _why_no_integer)
    return _cast(whole, _is_int64, "does not fit an integer of 64 bits", said=values)


def texts(values: pa.Array) -> pa.Array:
    """Text as it stands, every character of it; integers by their digits, booleans as ``true`` and ``false``.

    Binary values of a fixed width of 16 bytes are UUIDs (``8-4-4-4-12`` digits in small letters), all others are
    hexadecimal digits in small letters.

    Raises:
        WrongValueError: a text longer than `LONGEST_TEXT`, or one that is no UTF-8.
    """
    values = _plain(values)
    if is_binary(values.type):
        values = binary_texts(values)
    elif not _is_text(values.type):
        values = values.cast(pa.string())
    else:
        _require_utf8(values)
    values = _missing_as_null(values)
    _require(values, pc.less_equal(pc.binary_length(values), LONGEST_TEXT), lambda _: "is longer than 64 KiB")
    return values


def numbers(values: pa.Array, *, negative: bool = True) -> pa.Array:
    """Numbers as float64, where NaN is missing and there is no negative zero.

    Args:
        values: numbers, or texts of decimal numbers, with or without an exponent.
        negative: whether numbers below 0 are right.

    Raises:
        WrongValueError: infinity, a number that no float32 holds, anything that is no number.
    """
    values = _plain(values)
    number = _missing_as_null(values) if _is_text(values.type) else values
    if _is_text(values.type):
        _require(number, pc.match_substring_regex(number, _NUMBER), lambda _: "is not a number")
        number = _cast(number, _is_float, "is not a number", kind=pa.float64())
    number = pc.add(number.cast(pa.float64(), safe=False), 0.0)
    number = pc.if_else(pc.is_nan(number), pa.scalar(None, pa.float64()), number)
    finite = pc.less_equal(pc.abs(number), _LARGEST_NUMBER)
    _require(values, pc.fill_null(finite, True), lambda _: "is infinite, or too large for a float32")
    if not negative:
        _require(values, pc.fill_null(pc.greater_equal(number, 0.0), True), lambda _: "is negative")
    return number


def labels(values: pa.Array) -> pa.Array:
    """Labels 0 and 1, int8: numbers, booleans, or ``true`` and ``false`` in any of their usual spellings.

    Raises:
        WrongValueError: anything else.
    """
    values = _plain(values)
    if _is_text(values.type):
        values = _missing_as_null(values)
        index = pc.index_in(values, pa.array(list(_LABELS)))
        _require(values, pc.is_valid(index), lambda _: "is no label; labels are 0 or 1")
        return pa.array(list(_LABELS.values()), pa.int8()).take(index)
    if pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
    if not pa.types.is_boolean(values.type):
        number = values.cast(pa.float64(), safe=False)
        right = pc.or_(pc.equal(number, 0), pc.equal(number, 1))
        _require(values, right, lambda _: "is no label; labels are 0 or 1")
    return values.cast(pa.int8())


def splits(values: pa.Array) -> pa.Array:
    """Names of splits.

    Raises:
        WrongValueError: another word.
    """
    values = texts(values)
    right = pc.is_in(values, pa.array(list(SPLITS)))
    _require(values, right, lambda _: f"is no split; splits are {', '.join(SPLITS)}")
    return values


def times(values: pa.Array, unit: TimestampUnit, zone: str | None) -> tuple[pa.Array, set[str]]:
    """Whole seconds since 1970, UTC: what comes after the second is cut off, never rounded up.

    Args:
        values: numbers where ``unit`` is s, ms, us or mmdd; texts of ISO 8601, timestamps or dates where it is
            datetime.
        unit: of the log.
        zone: of times that carry none: an IANA name or an offset (``+08:00``); None: UTC.

    Returns:
        The seconds, and which forms of datetimes there were: ``local`` (without an offset), ``zoned``.

    Raises:
        WrongValueError: a number or text that is no such time, or a local time that its zone does not have, or has
            twice.
    """
    if unit == "mmdd":
        return _days(values), set()
    if unit != "datetime":
        return _whole_seconds(integers(values), _PER_SECOND[unit]), set()
    values = _plain(values)
    if pa.types.is_timestamp(values.type):
        instants = _whole_seconds(values.cast(pa.int64()), _PER_SECOND[values.type.unit])
        if values.type.tz is not None:
            return instants, {"zoned"}
        return _at(instants, zone, values), {"local"}
    if pa.types.is_date(values.type):
        return _at(values.cast(pa.timestamp("s")).cast(pa.int64()), zone, values), {"local"}
    return _of_iso(_missing_as_null(values), zone)


def _of_iso(values: pa.Array, zone: str | None) -> tuple[pa.Array, set[str]]:
    """Seconds of texts, and their forms."""
    if values.null_count == len(values):
        return pa.nulls(len(values), pa.int64()), set()
    # Nearly always all texts of a batch have one form, and no parts of seconds: then they are read at once.
    for kind, form in ((pa.timestamp("s"), "local"), (pa.timestamp("s", "UTC"), "zoned")):
        try:
            instants = values.cast(kind).cast(pa.int64())
        except pa.ArrowInvalid:
            continue
        return (_at(instants, zone, values) if form == "local" else instants), {form}
    parts = pc.extract_regex(values, _TIME)
    date, clock, offset, utc = (pc.struct_field(parts, name) for name in ("date", "time", "zone", "utc"))
    plain_date = pc.match_substring_regex(values, "^[0-9]{4}-[0-9]{2}-[0-9]{2}$")
    _require(values, pc.or_(plain_date, pc.is_valid(parts)), _why_no_time)
    zoned = pc.fill_null(pc.or_(pc.not_equal(offset, ""), pc.not_equal(utc, "")), False)
    both = pc.fill_null(pc.and_(pc.not_equal(offset, ""), pc.not_equal(utc, "")), False)
    _require(values, pc.invert(both), _why_no_time)
    text = pc.if_else(plain_date, values, pc.binary_join_element_wise(date, clock, "T"))
    text_zoned = pc.binary_join_element_wise(text, pc.if_else(pc.equal(offset, ""), "Z", offset), "")
    local = _cast(_where(pc.invert(zoned), text), _is_time, _NO_TIME, said=values, kind=pa.timestamp("s"))
    instants = _cast(_where(zoned, text_zoned), _is_time, _NO_TIME, said=values, kind=pa.timestamp("s", "UTC"))
    seconds = pc.coalesce(instants.cast(pa.int64()), _at(local.cast(pa.int64()), zone, values))
    forms = {form for form, part in (("local", local), ("zoned", instants)) if part.null_count < len(part)}
    return seconds, forms


def _at(local: pa.Array, zone: str | None, said: pa.Array) -> pa.Array:
    """Seconds UTC of a clock in a zone that shows ``local`` seconds."""
    if zone is None:
        return local
    if zone[0] in "+-":
        return pc.subtract(local, offset_seconds(zone))
    clock = local.cast(pa.timestamp("s"))

    def instants(part: pa.Array) -> pa.Array:
        return pc.assume_timezone(part, zone, ambiguous="raise", nonexistent="raise").cast(pa.int64())

    try:
        return instants(clock)
    except pa.ArrowInvalid:
        for index in range(len(clock)):
            try:
                instants(clock.slice(index, 1))
            except pa.ArrowInvalid:
                reason = f"is a time that clocks in {zone} do not show, or show twice; give its offset"
                raise WrongValueError(index, said[index].as_py(), reason) from None
        raise


def clock(seconds: pa.Array, zone: str | None, part: Literal["hour", "weekday"]) -> pa.Array:
    """What clocks in a zone show at a moment, int64: the hour, 0 .. 23, or the day of the week, 0 (Monday) .. 6.

    Args:
        seconds: since 1970, UTC.
        zone: an IANA name or an offset (``+08:00``); None: UTC.
        part: which of the two.
    """
    if zone is not None and zone[0] in "+-":
        seconds, zone = pc.add(seconds, offset_seconds(zone)), None
    moments = seconds.cast(pa.timestamp("s", zone))
    return (pc.hour if part == "hour" else pc.day_of_week)(moments).cast(pa.int64())


def offset_seconds(offset: str) -> int:
    """Seconds of an offset such as ``+08:00`` or ``-0530``."""
    digits = offset[1:].replace(":", "")
    seconds = int(digits[:2]) * 3_600 + int(digits[2:] or 0) * 60
    return -seconds if offset[0] == "-" else seconds


def _days(values: pa.Array) -> pa.Array:
    """Seconds of MMDD days, counted from January 1 of a year without a leap day."""
    values = _plain(values)
    if _is_text(values.type):
        # The one number whose leading zeros say nothing: it has four digits.
        values = _missing_as_null(values)
        _require(values, pc.match_substring_regex(values, "^[0-9]{3,4}$"), lambda _: _NO_DAY)
        days = values.cast(pa.int64())
    else:
        days = integers(values)
    month, day = np.divmod(pc.fill_null(days, 101).to_numpy(zero_copy_only=False), 100)
    right = (month >= 1) & (month <= 12)
    right &= (day >= 1) & (day <= _LAST_DAY[np.where(right, month, 0)])
    _require(values, pa.array(right), lambda _: _NO_DAY)
    seconds = (np.cumsum(_LAST_DAY)[month - 1] + day - 1) * 86_400
    return pa.array(seconds, pa.int64(), mask=~days.is_valid().to_numpy(zero_copy_only=False))


def _of_floats(values: pa.Array) -> pa.Array:
    exact = 2 ** {16: 11, 32: 24, 64: 53}[values.type.bit_width]
    number = values.cast(pa.float64())
    number = pc.if_else(pc.is_nan(number), pa.scalar(None, pa.float64()), number)
    whole = pc.equal(pc.floor(number), number)
    _require(values, pc.fill_null(pc.and_(whole, pc.is_finite(number)), True), lambda _: "is not an integer")
    small = pc.fill_null(pc.less(pc.abs(number), exact), True)
    _require(values, small, lambda _: f"has lost digits: a {values.type} does not hold all integers of that size")
    return number.cast(pa.int64())


def _whole_seconds(values: pa.Array, per_second: int) -> pa.Array:
    if per_second == 1:
        return values
    # numpy's division goes to the smaller second before 1970 too, Arrow's to the one nearer to 0.
    seconds = np.floor_divide(pc.fill_null(values, 0).to_numpy(zero_copy_only=False), per_second)
    return pa.array(seconds, pa.int64(), mask=values.is_null().to_numpy(zero_copy_only=False))


def _cast(
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


def _require(values: pa.Array, right: pa.Array, reason: Callable[[object], str]) -> None:
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


def _plain(values: pa.Array) -> pa.Array:
    """Dictionary-encoded values decoded, and all kinds of text as one."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_null(values.type) or (_is_text(values.type) and values.type != pa.string()):
        values = values.cast(pa.string())
    return values


def _missing_as_null(values: pa.Array) -> pa.Array:
    shortest = pc.min(pc.binary_length(values)).as_py()
    return pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values) if shortest == 0 else values


def _has_zero_in_front(values: pa.Array) -> bool:
    zero, minus = pc.starts_with(values, "0"), pc.starts_with(values, "-")
    return bool(pc.any(zero).as_py() or pc.any(minus).as_py())


def _where(mask: pa.Array, values: pa.Array) -> pa.Array:
    return pc.if_else(mask, values, pa.scalar(None, values.type))


def _is_text(kind: pa.DataType) -> bool:
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


def _is_time(text: object) -> bool:
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError:
        return False
    return moment.replace(tzinfo=UTC).year > 0


_NO_TIME = "is not a date and time of ISO 8601 (2017-11-25T01:02:03, with or without an offset such as +08:00 or Z)"
_NO_DAY = "is not a day MMDD"


def _why_no_time(_: object) -> str:
    return _NO_TIME


def _why_no_integer(value: object) -> str:
    text = str(value)
    if text.lstrip("+-")[:1] == "0" and text.lstrip("+-").isdigit() and text.lstrip("+-") != "0":
        return "is not an integer: with its leading zeros it is text, and without them it could be another id"
    mantissa = text.lower().partition("e")[0].lstrip("+-").replace(".", "", 1)
    if "e" in text.lower() and mantissa.isdigit():
        return "is not an integer: a number with an exponent may have lost digits; export it with all of them"
    return "is not an integer"
