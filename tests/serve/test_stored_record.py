"""A user's record against a plain-Python store that forgets nothing; its bytes, and what is wrong with them."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from pipeline.serve import stored_record
from pipeline.serve.stored_columns import StoredColumns
from pipeline.serve.stored_record import Record, decoded, encoded, merged, user_key, user_of
from schemas.errors import UserError
from tests.serve.stores import COLUMNS, Event, PlainStore, columns_of, events_of

WIDE = st.one_of(st.integers(0, 3), st.integers(0, 2**63 - 1))
TEXT = st.one_of(
    st.sampled_from(["a", "b", "é", "日本"]), st.text(st.characters(codec="utf-8"), min_size=1, max_size=9)
)
NUMBER = st.one_of(
    st.sampled_from([0.0, 1.5, 0.1, -3e38]),
    st.floats(-3e38, 3e38, allow_nan=False).map(lambda value: value + 0.0),
)
TEXTS = st.sets(TEXT, min_size=1, max_size=3).map(lambda values: tuple(sorted(values, key=str.encode)))
INTEGERS = st.sets(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=3).map(lambda values: tuple(sorted(values)))
TIMES = st.one_of(st.integers(0, 5), st.integers(0, 253_402_300_799))


def event(time: st.SearchStrategy[int]) -> st.SearchStrategy[Event]:
    return st.tuples(time, WIDE, *(st.none() | values for values in (TEXT, NUMBER, TEXTS, INTEGERS)))


ANY = st.lists(event(TIMES), max_size=12)
ALIKE = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), *[st.none()] * 4), max_size=8)
"""Events of which many are equal, or of the same second."""
BATCHES = st.lists(st.tuples(st.one_of(ANY, ALIKE, ALIKE), st.booleans()), max_size=6)


def in_milliseconds(events: list[Event]) -> list[Event]:
    """Events several of which are within a second, not in their order."""
    return [(time % 5 * 250 + time // 5 * 1_000, *rest) for time, *rest in events]


@pytest.mark.parametrize("unit", ["s", "ms"])
@given(BATCHES, st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_a_record_is_the_last_events_of_all_that_came(
    unit: str, batches: list[tuple[list[Event], bool]], keep: int
) -> None:
    columns = COLUMNS.model_copy(update={"timestamp_unit": unit})
    plain = PlainStore(keep, 1_000 if unit == "ms" else 1)
    key, content = user_key(7), encoded(user_key(7), 7, Record(), columns)
    for events, repeats in [*batches, *batches]:  # all of it again: nothing changes
        again = events if unit == "s" else in_milliseconds(events)
        result = merged(
            decoded(key, content, columns), columns.events(columns_of(again)), columns, keep, repeats=repeats
        )
        assert (result.new, result.known, result.not_kept) == plain.add(7, again, repeats=repeats)
        content = encoded(key, 7, result.record, columns)
        assert _history(content, columns) == plain.history(7)


def _history(content: bytes, columns: StoredColumns) -> list[Event]:
    record = decoded(user_key(7), content, columns)
    return events_of(
        {"time": record.moment.tolist(), **{name: list(values) for name, values in record.behaviors.items()}}
    )


def test_more_ties_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_record, "MOST_TIES", 3)
    record = Record()
    batches = [[(5, item, *[None] * 4) for item in range(first, first + 4)] for first in (0, 4, 8)]
    for events in batches:
        record = merged(record, COLUMNS.events(columns_of(events)), COLUMNS, 2, repeats=False).record
    # Of the second of which too many were dropped nothing is taken any more: what is there stays the same.
    assert record.ties is None
    first = encoded(user_key(7), 7, record, COLUMNS)
    for events in [*batches, [(5, 99, *[None] * 4)]]:
        result = merged(record, COLUMNS.events(columns_of(events)), COLUMNS, 2, repeats=False)
        assert encoded(user_key(7), 7, result.record, COLUMNS) == first
    assert result.not_kept == 1
    later = COLUMNS.events(columns_of([(6, 1, *[None] * 4)]))
    assert merged(record, later, COLUMNS, 2, repeats=False).new == 1


def test_what_is_known_of_a_user_is_the_last_of_it() -> None:
    record = Record()
    for time, city in ((5, "Rome"), (9, "Oslo"), (7, "Bonn"), (9, "Oslo")):
        events = COLUMNS.events({**columns_of([(time, 1, *[None] * 4)]), "city": city})
        record = merged(record, events, COLUMNS, 9, repeats=False).record
        record = decoded(user_key(7), encoded(user_key(7), 7, record, COLUMNS), COLUMNS)
    assert record.user == {"city": (9, "Oslo")}
    record = merged(record, COLUMNS.events({"city": "Turin"}), COLUMNS, 9, repeats=False).record
    assert record.user == {"city": (9, "Turin")}


@given(ANY, st.data())
@settings(max_examples=60, deadline=None)
def test_a_changed_byte_is_found(events: list[Event], data: st.DataObject) -> None:
    result = merged(Record(), COLUMNS.events(columns_of(events)), COLUMNS, 9, repeats=False)
    key = user_key("Ann")
    content = bytearray(encoded(key, "Ann", result.record, COLUMNS))
    index = data.draw(st.integers(0, len(content) - 1))
    content[index] ^= data.draw(st.integers(1, 255))
    with pytest.raises(UserError, match=r"^user 'Ann': its record (is damaged|has version)"):
        decoded(key, bytes(content), COLUMNS)
    cut = encoded(key, "Ann", result.record, COLUMNS)[: data.draw(st.integers(0, len(content) - 1))]
    with pytest.raises(UserError, match=r"^user 'Ann': its record is damaged"):
        decoded(key, cut, COLUMNS)


def test_a_record_of_another_user_or_version_is_refused() -> None:
    content = encoded(user_key(1), 1, Record(), COLUMNS)
    with pytest.raises(UserError, match=r"^user '1': its record is damaged"):
        decoded(user_key("1"), content, COLUMNS)
    with pytest.raises(UserError, match=r"^user 1: its record has version 9, and this program reads version 1; use"):
        decoded(user_key(1), b"\x09" + content[1:], COLUMNS)


@given(st.lists(st.one_of(st.integers(0, 2**63 - 1), st.text(st.characters(codec="utf-8"), max_size=600)), unique=True))
@settings(deadline=None)
def test_keys_of_users(users: list[int | str]) -> None:
    assert len({user_key(user) for user in users}) == len(users)
    for user in users:
        key = user_key(user)
        assert len(key) <= 511, "LMDB takes no longer ones"
        assert user_of(key, lambda: encoded(key, user, Record(), COLUMNS)) == user  # noqa: B023
    integers = sorted(user for user in users if isinstance(user, int))
    assert sorted(map(user_key, integers)) == [user_key(user) for user in integers]


def test_a_behaviour_takes_a_few_bytes() -> None:
    columns = COLUMNS.model_copy(update={"behaviors": COLUMNS.behaviors[:2], "users": ()})
    events = {
        "time": [1_500_000_000 + 977 * number for number in range(1_000)],
        "item": [number * 7_919 % 1_000_003 for number in range(1_000)],
        "kind": [("pv", "cart", "buy")[number % 3] for number in range(1_000)],
    }
    result = merged(Record(), columns.events(events), columns, 1_000, repeats=False)
    assert len(encoded(user_key(1), 1, result.record, columns)) < 7_000
