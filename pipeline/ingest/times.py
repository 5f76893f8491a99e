"""Raw values to moments: whole seconds since 1970, by rules of this program; see `pipeline.ingest.values`.

N = values.
"""

from datetime import UTC, datetime
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.ingest.values import WrongValueError, cast, integers, is_text, missing_as_null, plain, require
from schemas.prepare import TimestampUnit

_TIME = (
    r"^(?P<date>[0-9]{4}-[0-9]{2}-[0-9]{2})[ T](?P<time>[0-9]{2}:[0-9]{2}(?::[0-9]{2})?)(?:\.[0-9]+)?"
    r" ?(?P<zone>Z|[+-][0-9]{2}(?::?[0-9]{2})?)?(?P<utc>UTC)?$"
)
_ZONED = "[0-9]:[0-9]{2}.*(?:Z|UTC|[+-][0-9]{2}(?::?[0-9]{2})?)$"
PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
"""Units in a second, of times that are numbers."""
LATEST = 253_402_300_799
"""The last second of the year 9999; times that are earlier than 1970 or later than it are no times of a log."""
_LAST_DAY = np.array([0, 31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31])
"""Number of days of each month, in a year without a leap day."""


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
        return _whole_seconds(integers(values), PER_SECOND[unit]), set()
    values = plain(values)
    if pa.types.is_timestamp(values.type):
        instants = _whole_seconds(values.cast(pa.int64()), PER_SECOND[values.type.unit])
        if values.type.tz is not None:
            return instants, {"zoned"}
        return _at(instants, zone, values), {"local"}
    if pa.types.is_date(values.type):
        return _at(values.cast(pa.timestamp("s")).cast(pa.int64()), zone, values), {"local"}
    return _of_iso(missing_as_null(values), zone)


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
    require(values, pc.or_(plain_date, pc.is_valid(parts)), _why_no_time)
    zoned = pc.fill_null(pc.or_(pc.not_equal(offset, ""), pc.not_equal(utc, "")), False)
    both = pc.fill_null(pc.and_(pc.not_equal(offset, ""), pc.not_equal(utc, "")), False)
    require(values, pc.invert(both), _why_no_time)
    text = pc.if_else(plain_date, values, pc.binary_join_element_wise(date, clock, "T"))
    text_zoned = pc.binary_join_element_wise(text, pc.if_else(pc.equal(offset, ""), "Z", offset), "")
    local = cast(_where(pc.invert(zoned), text), _is_time, _NO_TIME, said=values, kind=pa.timestamp("s"))
    instants = cast(_where(zoned, text_zoned), _is_time, _NO_TIME, said=values, kind=pa.timestamp("s", "UTC"))
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
    values = plain(values)
    if is_text(values.type):
        # The one number whose leading zeros say nothing: it has four digits.
        values = missing_as_null(values)
        require(values, pc.match_substring_regex(values, "^[0-9]{3,4}$"), lambda _: _NO_DAY)
        days = values.cast(pa.int64())
    else:
        days = integers(values)
    month, day = np.divmod(pc.fill_null(days, 101).to_numpy(zero_copy_only=False), 100)
    right = (month >= 1) & (month <= 12)
    right &= (day >= 1) & (day <= _LAST_DAY[np.where(right, month, 0)])
    require(values, pa.array(right), lambda _: _NO_DAY)
    seconds = (np.cumsum(_LAST_DAY)[month - 1] + day - 1) * 86_400
    return pa.array(seconds, pa.int64(), mask=~days.is_valid().to_numpy(zero_copy_only=False))


def _whole_seconds(values: pa.Array, per_second: int) -> pa.Array:
    if per_second == 1:
        return values
    # numpy's division goes to the smaller second before 1970 too, Arrow's to the one nearer to 0.
    seconds = np.floor_divide(pc.fill_null(values, 0).to_numpy(zero_copy_only=False), per_second)
    return pa.array(seconds, pa.int64(), mask=values.is_null().to_numpy(zero_copy_only=False))


def _where(mask: pa.Array, values: pa.Array) -> pa.Array:
    return pc.if_else(mask, values, pa.scalar(None, values.type))


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
