"""What is wrong with a request is said in one line that names the place; what may be missing is missing."""

import datetime
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.ingest.prepare import prepare
from pipeline.serve.encoding import MOST_CANDIDATES, RequestEncoder
from schemas.errors import RequestError
from schemas.stream import HistorySequence, StreamSettings
from tests.raw_logs import Logs, Row, encoder_of, random_lines

SEQUENCES = {"all": HistorySequence(length=500), "clicks": HistorySequence(length=5, where={"kind": ("click",)})}


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Logs:
    return Logs(tmp_path_factory.mktemp("logs"), random_lines(3), "text", "datetime", shown=True)


@pytest.fixture(scope="module")
def encoder(logs: Logs) -> RequestEncoder:
    """Made for a log of which only clicks and purchases count, and whose times have no zone."""
    settings = logs.settings(keep={"kind": ["click", "buy"]}, timestamp_zone=None, since="2017-07-14T13:00:00")
    prepare(settings, logs.folder / "data")
    return encoder_of(logs.folder / "data", StreamSettings(sequences=SEQUENCES))


@pytest.fixture(scope="module")
def history(logs: Logs) -> Row:
    columns = logs.history("u", random.Random(0))
    # All of them count, so that each place is looked at.
    return columns | {"kind": ["click"] * len(columns["item"]), "time": ["2017-07-15T01:02:03"] * len(columns["item"])}


@pytest.fixture(scope="module")
def candidates(logs: Logs) -> list[Row]:
    assert logs.shown is not None
    return [logs.candidate(row, row["item"]) for row in logs.shown[:3]]


def changed(column: str, index: int, value: Any) -> Callable[[Row], Row]:
    def change(history: Row) -> Row:
        values = list(history[column])
        values[index] = value
        return history | {column: values}

    return change


WRONG_HISTORIES: list[tuple[Any, str]] = [
    (lambda _: 5, "history is 5; give lists of values by column"),
    (lambda h: h | {"nope": [1]}, "history: no column 'nope'; there are age, brand, "),
    (lambda h: {name: h[name] for name in h if name != "time"}, "history: column time is missing"),
    (lambda h: {name: h[name] for name in h if name != "kind"}, "history: column kind is missing"),
    (
        lambda h: {name: h[name] for name in h if name != "place"},
        "history: column place is missing; give it, with null for a value that is unknown",
    ),
    (lambda h: h | {"item": h["item"][1:]}, "history.item has "),
    (lambda h: h | {"a\nb": [1]}, "history: no column 'a\\nb'; there are age, brand, "),
    (changed("price", 2, "x" * 70), f"history.price[2] is '{'x' * 59}..., text where others are a number"),
    (changed("time", 2, "x" * 70), f"history.time[2]: '{'x' * 59}... is not a date and time"),
    (lambda h: h | {"item": "abc"}, "history.item is 'abc'; give a list, with a value a behaviour"),
    (lambda h: h | {"item": 7}, "history.item is 7; give a list"),
    (changed("item", 3, 7), "history.item[3] is 7, a number where others are text"),
    (changed("item", 3, b"x"), "history.item[3] is b'x', bytes where others are text"),
    (changed("item", 3, None), "history.item[3] is missing"),
    (changed("item", 3, ""), "history.item[3] is missing"),
    (changed("item", 3, float("nan")), "history.item[3] is nan, a number where others are text"),
    (changed("item", 3, "x" * 70_000), "history.item[3]: 'xxxxx"),
    (changed("item", 3, "\ud800"), "history.item[3] is '\\ud800', which is no value that a log can have"),
    (changed("time", 2, None), "history.time[2] is missing"),
    (changed("time", 2, "yesterday"), "history.time[2]: 'yesterday' is not a date and time of ISO 8601"),
    (changed("time", 2, "1960-01-01"), "history.time[2] is -315619200, a time before 1970 or after 9999"),
    (changed("time", 2, "2017-01-01T00:00:00Z"), "history.time has times without an offset, history.time times with"),
    (lambda h: h | {"time": list(range(len(h["time"])))}, "history.time[0] is 0, which is not a time (datetime)"),
    (changed("price", 2, -1.0), "history.price[2]: -1.0 is negative"),
    (changed("price", 2, float("inf")), "history.price[2]: inf is infinite, or too large"),
    (changed("price", 2, "x"), "history.price[2] is 'x', text where others are a number"),
    (changed("price", 2, True), "history.price[2] is True, true or false where others are a number"),
    (changed("numbers", 2, 3), "history.numbers[2] is 3, a number where others are a list"),
    (changed("numbers", 2, ["x"]), "history.numbers[2] is ['x'], "),
    (changed("numbers", 2, [2**70]), "history.numbers[2] is [1180591620717411303424], which is no value"),
    (lambda h: h | {"numbers": [["x"]] * len(h["numbers"])}, "history.numbers[0]: 'x' is not an integer"),
    (changed("place", 2, {"a": 1}), "history.place[2] is {'a': 1}, dict where others are text"),
    (lambda h: h | {"place": [{"a": 1}] * len(h["place"])}, "history.place[0] is {'a': 1}, which is not text"),
    (lambda h: h | {"age": ["old"]}, "history.age has 1 values for "),
    (lambda h: h | {"income": "rich"}, "history.income: 'rich' is not a number"),
    (lambda h: h | {"user.hobbies": "x"}, "history.user.hobbies is 'x', which is not a list of values of type text"),
]


@pytest.mark.parametrize(("change", "said"), WRONG_HISTORIES, ids=[said[:40] for _, said in WRONG_HISTORIES])
def test_wrong_histories(
    encoder: RequestEncoder, history: Row, candidates: list[Row], change: Callable[[Row], Any], said: str
) -> None:
    with pytest.raises(RequestError) as error:
        encoder.encode(change(history), candidates)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


WRONG_CANDIDATES: list[tuple[Any, str]] = [
    (lambda c: 5, "candidates is 5; give a list of candidates"),
    (lambda c: c[0], "candidates is {'item'"),
    (lambda c: "abc", "candidates is 'abc'"),
    (lambda c: [5], "candidates[0] is 5; give its columns by name"),
    (lambda c: [c[0], {}], "candidates[1]: column item is missing"),
    (lambda c: [c[0], c[1] | {"click": 1}], "candidates[1]: no column 'click'; there are brand, item, "),
    (
        lambda c: [c[0], {n: c[1][n] for n in c[1] if n != "slot"}],
        "candidates[1]: column slot is missing; give it, with null for a value that is unknown",
    ),
    (lambda c: [c[0] | {"slot": 1}, c[1] | {"slot": "a"}], "candidates[1].slot is 'a', text where others are a number"),
    (lambda c: [c[0] | {"slot": 1}, c[1] | {"slot": 1.5}], "candidates[1].slot: 1.5 is not an integer"),
    (lambda c: [c[0], c[1] | {"item": None}], "candidates[1].item is missing"),
    (lambda c: [c[0], c[1] | {"item": ["a"]}], "candidates[1].item is ['a'], a list of text where others are text"),
    (lambda c: [c[0], c[1] | {"time": None}], "candidates[1].time is missing"),
    (lambda c: [c[0] | {"time": "2017-01-01T00:00:00Z"}], "history.time has times without an offset, candidates"),
    (lambda c: c * MOST_CANDIDATES, "300,000 candidates; at most 100,000 are scored at once"),
    (lambda c: [c[0] | {"item": "new", "tags": "x"}], "candidates[0].tags is 'x', which is not a list"),
]


@pytest.mark.parametrize(("change", "said"), WRONG_CANDIDATES, ids=[said[:40] for _, said in WRONG_CANDIDATES])
def test_wrong_candidates(
    encoder: RequestEncoder, history: Row, candidates: list[Row], change: Callable[[list[Row]], Any], said: str
) -> None:
    with pytest.raises(RequestError) as error:
        encoder.encode(history, change(candidates))
    assert str(error.value).startswith(said)


def test_negative_ids_are_no_ids(tmp_path: Path) -> None:
    logs = Logs(tmp_path, random_lines(4, 40), "integer", "ms", shown=True)
    prepare(logs.settings(), tmp_path / "data")
    encoder = encoder_of(tmp_path / "data", StreamSettings())
    history = logs.history("u", random.Random(0))
    for item, said in ((-7, r"history.item\[1\] is -7, and raw ids"), (7.5, r"history.item\[1\]: 7.5 is not an int")):
        with pytest.raises(RequestError, match=said):
            encoder.encode(changed("item", 1, item)(history), [])
    with pytest.raises(RequestError, match=r"history.item\[0\]: 'a' is not an integer"):
        encoder.encode(history | {"item": ["a"] * len(history["item"])}, [])


def test_what_may_be_missing(encoder: RequestEncoder, history: Row, candidates: list[Row]) -> None:
    assert len(encoder.encode(history, []).batch) == 0
    for nothing in ({}, {"age": "old"}, {"item": [], "time": [], "kind": [], **_no_features(encoder)}):
        batch = encoder.encode(nothing, candidates).batch
        assert [len(each.item_M) for each in batch.histories.values()] == [0, 0]
        assert len(batch) == 3
    # A user without features, and an item that nobody knows.
    whole = encoder.encode(history, candidates).batch
    lists = {name: values for name, values in history.items() if isinstance(values, list)}
    batch = encoder.encode(changed("item", 2, "new")(lists), candidates).batch
    assert batch.features_U["age"].tolist() == [0]
    assert whole.features_U["age"].tolist() != [0] or history["age"] is None
    assert batch.features_U["income"].tolist() == [0.0]
    assert (batch.histories["all"].item_M == 0).sum() > (whole.histories["all"].item_M == 0).sum()


def _no_features(encoder: RequestEncoder) -> Row:
    return {column.name: [] for column in encoder.columns.history if column.required}


def test_unknown_items_may_bring_their_features(encoder: RequestEncoder, candidates: list[Row]) -> None:
    known, new, bare = (candidates[0] | {"item": item} for item in ("i", "new", "new"))
    features = {"brand": "A", "tags": ["x", "y"], "price": 2.5}
    batch = encoder.encode({}, [known | features, new | features, bare]).batch
    assert batch.features_T["brand"].tolist()[1] > 0
    assert batch.features_T["brand"].tolist()[2] == 0
    lengths = batch.bags["tags"].offset_B1.diff()[batch.features_T["tags"].long()].tolist()
    assert lengths[2] == 0
    assert lengths[1] > 0
    assert batch.features_T["price"].tolist()[1] > 0
    # What is known of an item is not what a request says of it.
    alone = encoder.encode({}, [known]).batch
    assert batch.features_T["brand"].tolist()[0] == alone.features_T["brand"].tolist()[0]
    assert batch.features_T["mass"].tolist()[0] == alone.features_T["mass"].tolist()[0]


def test_what_does_not_count_is_in_no_window(encoder: RequestEncoder, history: Row, candidates: list[Row]) -> None:
    number = len(history["item"])
    # The log of impressions has a zone of its own: midnight of the events is later in Nepal.
    candidate = candidates[0] | {"time": "2017-07-20T05:45:00"}

    def seen(**columns: Any) -> int:
        return len(encoder.encode(history | columns, [candidate]).batch.histories["all"].item_M)

    assert seen() == number
    assert seen(kind=["click"] + ["cart"] * (number - 1)) == 1
    # What is filtered may hold whatever it likes; a store has what counts alone.
    assert seen(kind=["click"] + ["cart"] * (number - 1), item=["i"] + [""] * (number - 1)) == 1
    unfiltered = {name: values for name, values in history.items() if name != "kind"}
    with pytest.raises(RequestError, match="history: column kind is missing"):
        encoder.encode(unfiltered, [candidate])
    # Before the log begins; at the time of the candidate; later.
    assert seen(time=["2017-07-14T12:59:59"] * number) == 0
    assert seen(time=["2017-07-14T13:00:00"] * number) == number
    assert seen(time=["2017-07-20T00:00:00"] * number) == 0
    assert seen(time=["2017-07-19T23:59:59.9"] * number) == number
    assert seen(time=["2018-01-01"] * number) == 0


def test_values_come_in_any_of_their_types(encoder: RequestEncoder, history: Row, candidates: list[Row]) -> None:
    expected = encoder.encode(history, candidates)
    number = len(history["item"])
    moment = datetime.datetime(2017, 7, 15, 1, 2, 3)
    for columns in (
        {"item": np.array(history["item"], object)},
        {"item": pa.array(history["item"]), "time": pa.chunked_array([pa.array(history["time"])])},
        {"item": tuple(history["item"]), "price": np.array(history["price"], float)},
        {"time": [moment] * number},
        {"age": [history["age"]] * number},
    ):
        request = encoder.encode(history | columns, candidates)
        assert request.batch.describe() == expected.batch.describe()
        assert all(np.array_equal(request.given[name], expected.given[name]) for name in SEQUENCES)
    assert encoder.seconds(history) == [int(moment.replace(tzinfo=datetime.UTC).timestamp())] * number
    assert encoder.seconds({}) == []
