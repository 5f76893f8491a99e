"""One table of odd values: what each means, in CSV and in Parquet, among events and impressions, for every engine."""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.ingest.columns import event_columns, impression_columns
from pipeline.ingest.duckdb_engine import DuckDBEngine
from pipeline.ingest.engine import Engine
from pipeline.ingest.reading import Tally, read_file
from pipeline.ingest.sources import LogFiles, log_files
from schemas.errors import UserError
from schemas.prepare import PrepareSettings
from tests.examples import examples

MISSING, REFUSED = None, "refused"
NOON = int(datetime(2017, 11, 25, 12, tzinfo=UTC).timestamp())
DAY = 86_400

INTEGERS = {
    "0": 0,
    "7": 7,
    "9223372036854775807": 2**63 - 1,
    "7.0": 7,
    "123456789012345.000": 123456789012345,
    "": MISSING,
    "9223372036854775808": REFUSED,
    "1234567890123456.0": REFUSED,
    "007": REFUSED,
    "00": REFUSED,
    "-0": REFUSED,
    "+7": REFUSED,
    " 7": REFUSED,
    "7 ": REFUSED,
    "7.5": REFUSED,
    "7.": REFUSED,
    ".0": REFUSED,
    "7.30012E+12": REFUSED,
    "1e3": REFUSED,
    "0x1F": REFUSED,
    "1_000": REFUSED,
    "1,000": REFUSED,
    "\N{ARABIC-INDIC DIGIT SEVEN}": REFUSED,
    "\N{FULLWIDTH DIGIT SEVEN}": REFUSED,
    "nan": REFUSED,
    "NULL": REFUSED,
    "None": REFUSED,
    "N/A": REFUSED,
    "true": REFUSED,
    "inf": REFUSED,
    "7\0": REFUSED,
}
SECONDS = {"1511611200": NOON, "1511611200.0": NOON, "1511611200.5": REFUSED, "1.51156e+09": REFUSED, "": MISSING}
MILLISECONDS = {"1511611200000": NOON, "1511611200999": NOON, "1511611199999": NOON - 1}
DAYS = {"0101": 0, "101": 0, "1231": 364 * DAY, "0301": 59 * DAY, "0229": REFUSED, "1301": REFUSED, "11": REFUSED}
DATETIMES = {
    "2017-11-25T12:00:00Z": NOON,
    "2017-11-25 12:00:00": NOON,
    "2017-11-25 12:00": NOON,
    "2017-11-25T12:00:00.999999999": NOON,
    "2017-11-25 12:00:00 UTC": NOON,
    "2017-11-25T20:00:00+08:00": NOON,
    "2017-11-25 20:00:00 +0800": NOON,
    "2017-11-25T07:00:00-05": NOON,
    "2017-11-25T17:30:00.5+05:30": NOON,
    "2017-11-25": NOON - DAY // 2,
    "": MISSING,
    "2017-11-25T12:00:00,5": REFUSED,
    "25/11/2017 12:00": REFUSED,
    "11/25/2017": REFUSED,
    "20171125": REFUSED,
    "2017-11-25 12:00 PM": REFUSED,
    "2017-11-25 12:00:00 CET": REFUSED,
    "2017-11-25T12:00:60": REFUSED,
    "2017-02-29": REFUSED,
    "2017-11-25T24:00:00": REFUSED,
    "2017-11-25T12:00:00+25:00": REFUSED,
    "1511611200": REFUSED,
    "yesterday": REFUSED,
}
LABELS = {
    "0": 0,
    "1": 1,
    "1.0": 1,
    "true": 1,
    "False": 0,
    "TRUE": 1,
    "": MISSING,
    "2": REFUSED,
    "-1": REFUSED,
    "0.5": REFUSED,
    "yes": REFUSED,
    " 1": REFUSED,
}
TEXTS = {text: text for text in ("pv", " pv", "PV", "null", "NaN", "0", "é", "a'b", 'say "hi"', "x;y", "🙂")} | {
    "": MISSING
}

TABLE: list[tuple[str, dict[str, Any], str, Any]] = [
    (column, more, text, expected)
    for column, more, values in (
        ("item_id", {}, INTEGERS),
        ("timestamp", {}, SECONDS),
        ("timestamp", {"timestamp_unit": "ms"}, MILLISECONDS),
        ("timestamp", {"timestamp_unit": "mmdd"}, DAYS),
        ("timestamp", {"timestamp_unit": "datetime"}, DATETIMES),
        ("label", {}, LABELS),
        ("category_id", {"text_category": True}, TEXTS),
    )
    for text, expected in values.items()
]

TYPED: list[tuple[str, dict[str, Any], pa.Array, Any]] = [
    ("item_id", {}, pa.array([7], pa.uint8()), 7),
    ("item_id", {}, pa.array([2**63], pa.uint64()), REFUSED),
    ("item_id", {}, pa.array([7.0, None], pa.float64()), 7),
    ("item_id", {}, pa.array([float("nan")]), MISSING),
    ("item_id", {}, pa.array([2.0**53]), REFUSED),
    ("item_id", {}, pa.array([2.0**24], pa.float32()), REFUSED),
    ("item_id", {}, pa.array([7.5]), REFUSED),
    ("item_id", {}, pa.array([True]), REFUSED),
    ("item_id", {}, pa.array([[7]]), REFUSED),
    ("item_id", {}, pa.array(["7"]).dictionary_encode(), 7),
    ("item_id", {}, pa.array(["7"], pa.large_string()), 7),
    ("item_id", {}, pa.array([b"7"]), REFUSED),
    ("timestamp", {}, pa.array([NOON], pa.timestamp("s")), REFUSED),
    ("timestamp", {"timestamp_unit": "datetime"}, pa.array([NOON * 1000 + 999], pa.timestamp("ms")), NOON),
    ("timestamp", {"timestamp_unit": "datetime"}, pa.array([NOON * 10**9], pa.timestamp("ns", "Asia/Tokyo")), NOON),
    ("timestamp", {"timestamp_unit": "datetime"}, pa.array([NOON // DAY], pa.date32()), NOON - DAY // 2),
    ("timestamp", {"timestamp_unit": "datetime"}, pa.array([NOON]), REFUSED),
    ("label", {}, pa.array([True]), 1),
    ("label", {}, pa.array([1.0]), 1),
    ("label", {}, pa.array([0.5]), REFUSED),
    ("category_id", {"text_category": True}, pa.array([12]), "12"),
    ("category_id", {"text_category": True}, pa.array([1.5]), REFUSED),
]

COLUMNS = {"category_id": "f_category"}
"""What columns of the files are called once they are read, where it is something else."""
GOOD = {"user_id": "1", "item_id": "5", "category_id": "2", "timestamp": "1511611200", "label": "1"}
GOOD_TIME = {"datetime": "2017-11-25", "mmdd": "0101"}


def good_line(unit: str) -> dict[str, str]:
    return GOOD | {"timestamp": GOOD_TIME.get(unit, GOOD["timestamp"])}


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({name: [line[name] for line in lines] for name in lines[0]}), path)
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def log(role: str, path: Path, features: Sequence[dict[str, Any]] = (), **more: Any) -> LogFiles:
    files = (str(path),)
    of_role = {"files": files, **more}
    # What both logs must agree in.
    own = {"files": files} | {name: more[name] for name in ("text_category", "timestamp_unit") if name in more}
    settings = PrepareSettings.model_validate(
        {
            "events": of_role if role == "events" else own,
            "impressions": of_role if role == "impressions" else own,
            "split": {"kind": "impressions"},
            "features": features,
        }
    )
    if role == "events":
        return log_files(role, settings.events, event_columns(settings), skip_corrupt=False)
    assert settings.impressions is not None
    return log_files(role, settings.impressions, impression_columns(settings), skip_corrupt=False)


def read(engine: Engine, number: int, role: str, path: Path, column: str, **more: Any) -> list[Any] | str:
    """The column as the engine has it; `REFUSED` if it is, in one line that names the file."""
    said = ""
    try:
        # Under a name of its own, so that one engine reads all files of a test.
        files = replace(log(role, path, **more), role=f"{role}{number}")
        table, tally = engine.load(files, lambda _: None, coded=True)
        name = COLUMNS.get(column, column)
        values: list[Any] = engine.fetch(table.select(name))[name].to_pylist()
        if (texts := engine.texts(name)) is not None and column == "category_id":
            text_of = dict(zip(*engine.fetch(texts).select(["code", "text"]).to_pydict().values(), strict=True))
            values = [None if code is None else text_of[code] for code in values]
    except UserError as error:
        said = str(error)
    if said:
        assert str(path) in said
        assert column in said
        assert "\n" not in said
        return REFUSED
    assert tally["read"] == len(values)
    return values


@pytest.fixture(params=["duckdb", pytest.param("spark", marks=pytest.mark.spark)])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    folder = tmp_path / "engine"
    folder.mkdir()
    if request.param == "spark":
        from pipeline.ingest.spark_engine import SparkEngine

        made: Engine = SparkEngine(folder, 2 << 30, 1)
    else:
        made = DuckDBEngine(folder, 2 << 30, 1)
    yield made
    made.close()


@pytest.mark.parametrize("storage", ["csv", "tsv", "parquet"])
@pytest.mark.parametrize("role", ["events", "impressions"])
def test_a_text_means_the_same_everywhere(engine: Engine, tmp_path: Path, role: str, storage: str) -> None:
    wrong = []
    for number, (column, more, text, expected) in enumerate(TABLE):
        if column == "label" and role == "events":
            continue
        line = good_line(more.get("timestamp_unit", "s"))
        path = tmp_path / f"{number}.{storage}"
        if storage == "tsv":
            lines = ({name: name for name in line}, line, line | {column: text})
            path.write_text("\n".join("\t".join(each.values()) for each in lines))
            more = {**more, "quote": None}
        else:
            write(path, [line, line | {column: text}])
        seen = read(engine, number, role, path, column, **more)
        # The good line beside it is read, whatever the odd one is.
        if seen != REFUSED:
            assert len(seen) == 2
            seen = seen[1]
        if seen != expected:
            wrong.append(f"{column} {text!r} is {seen!r}, not {expected!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("role", ["events", "impressions"])
def test_declared_types_mean_what_their_texts_mean(engine: Engine, tmp_path: Path, role: str) -> None:
    wrong = []
    for number, (column, more, values, expected) in enumerate(TYPED):
        if column == "label" and role == "events":
            continue
        line = good_line(more.get("timestamp_unit", "s"))
        table = pa.table({name: pa.array([value] * len(values)) for name, value in line.items()})
        path = tmp_path / f"{number}.parquet"
        pq.write_table(table.set_column(table.column_names.index(column), column, values), path)
        seen = read(engine, number, role, path, column, **more)
        if (seen if seen == REFUSED else seen[0]) != expected:
            wrong.append(f"{column} {values.type} {values[0]} is {seen!r}, not {expected!r}")
    assert not wrong, "\n".join(wrong)


quick = settings(
    max_examples=examples(25, 200), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def column_of(path: Path, column: str, **more: Any) -> list[Any]:
    files = log("events", path, **more)
    name = COLUMNS.get(column, column)
    return [value for batch in read_file(files, 0, Tally(), lambda _: None) for value in batch[name].to_pylist()]


@quick
@given(st.text("0123456789.-+eE _x", min_size=1, max_size=22))
def test_integers_by_a_rule_of_their_own(tmp_path: Path, text: str) -> None:
    expected: int | None = None
    if re.fullmatch(r"0|-?[1-9][0-9]*", text) and -(2**63) <= int(text) < 2**63:
        expected = int(text)
    if re.fullmatch(r"(?:0|-?[1-9][0-9]{0,14})\.0+", text):
        expected = int(text.split(".")[0])
    for storage in ("csv", "parquet"):
        write(tmp_path / f"log.{storage}", [GOOD, GOOD | {"item_id": text}])
        if expected is None:
            with pytest.raises(UserError, match=r"(line 3|row 2): column item_id: "):
                column_of(tmp_path / f"log.{storage}", "item_id")
        else:
            assert column_of(tmp_path / f"log.{storage}", "item_id") == [5, expected]


offsets = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))


@quick
@given(
    st.lists(
        st.tuples(
            st.datetimes(datetime(1970, 1, 2), datetime(2200, 1, 1), timezones=offsets),
            st.sampled_from("sm"),
            st.booleans(),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_every_form_of_a_time_is_the_same_moment(tmp_path: Path, moments: list[tuple[datetime, str, bool]]) -> None:
    forms = {"s": "seconds", "m": "microseconds"}
    texts = [moment.isoformat(" " if space else "T", forms[form]) for moment, form, space in moments]
    seconds = [(moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(seconds=1) for moment, *_ in moments]
    write(tmp_path / "log.csv", [GOOD | {"timestamp": text} for text in texts])
    write(tmp_path / "log.parquet", [GOOD | {"timestamp": moment} for moment, *_ in moments])
    start = datetime(1970, 1, 1, tzinfo=UTC)
    numbers = [(moment - start) // timedelta(microseconds=1) for moment, *_ in moments]
    write(tmp_path / "us.csv", [GOOD | {"timestamp": str(number)} for number in numbers])
    for name, unit in (("log.csv", "datetime"), ("log.parquet", "datetime"), ("us.csv", "us")):
        assert column_of(tmp_path / name, "timestamp", timestamp_unit=unit) == seconds


@quick
@given(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])), min_size=1, max_size=6))
def test_text_comes_through_as_it_is(tmp_path: Path, texts: list[str]) -> None:
    for storage in ("csv", "parquet"):
        path = tmp_path / f"log.{storage}"
        write(path, [GOOD | {"category_id": text} for text in texts])
        assert column_of(path, "category_id", text_category=True) == [text or None for text in texts]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('1,"5,2,1511611200', "line 3: a quote"),
        ('1,"5"0,2,1511611200', "line 3: a quote"),
        ('1,"5,2,1511611200\n1,5",2,1511611200', "line 3: a quote"),
        ("1,5,2", "line 3: 3 columns, 4 are expected"),
        ("1,5,2,1511611200,9", "line 3: 5 columns, 4 are expected"),
    ],
)
def test_a_stray_quote_swallows_nothing(tmp_path: Path, line: str, message: str) -> None:
    good = "1,5,2,1511611200"
    path = tmp_path / "log.csv"
    for many in (1, 300_000):  # in the first block, and with many blocks behind it
        path.write_text("\n".join(["user_id,item_id,category_id,timestamp", good, line, *[good] * many]) + "\n")
        with pytest.raises(UserError, match=message):
            column_of(path, "item_id")


def test_quotes_that_mean_something(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(
        'user_id,item_id,category_id,timestamp\r\n"1","5","a ""b"", c","1511611200"\r\n\r\n1,5,27" d,1511611200'
    )
    assert column_of(path, "category_id", text_category=True) == ['a "b", c', '27" d']
    path.write_text('user_id|item_id|category_id|timestamp\n1|5|"a|1511611200\n1|5|b"|1511611200\n')
    assert column_of(path, "category_id", text_category=True, quote=None, delimiter="|") == ['"a', 'b"']


def test_local_times_are_of_the_zone_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    write(path, [GOOD | {"timestamp": text} for text in ("2017-11-25 12:00", "2017-11-25T12:00:00Z")])
    for zone, hours in (("+08:00", 8), ("-0530", -5.5), ("Asia/Shanghai", 8), ("America/New_York", -5)):
        seconds = column_of(path, "timestamp", timestamp_unit="datetime", timestamp_zone=zone)
        assert seconds == [NOON - hours * 3_600, NOON]
    write(path, [GOOD | {"timestamp": "2017-11-05 01:30:00"}])
    with pytest.raises(UserError, match=r"line 2: column timestamp: .* do not show, or show twice"):
        column_of(path, "timestamp", timestamp_unit="datetime", timestamp_zone="America/New_York")
