"""Records of whole numbers in 32-bit words: what comes out is what went in, and no word is wasted."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from embeddings.search.messages import Record

MOST = (1 << 62) - 1
"""Two words of 31 bits each, of which a field may use all."""


@st.composite
def records(draw: st.DrawFn) -> dict[str, tuple[int, list[int]]]:
    """By field, its largest value and values up to it; many fields end at a power of 2, and many values at the ends."""
    bits = draw(st.lists(st.integers(0, 62), min_size=1, max_size=7))
    count = draw(st.integers(0, 5))
    fields = {}
    for number, width in enumerate(bits):
        full = max((1 << width) - 1, 0)
        largest = draw(st.sampled_from([full, min(1 << width, MOST), full // 2]) | st.integers(0, full))
        values = st.sampled_from([0, largest, largest // 2, largest & ~1]) | st.integers(0, largest)
        fields[str(number)] = largest, draw(st.lists(values, min_size=count, max_size=count))
    return fields


def column(values: list[int], largest: int) -> torch.Tensor:
    """As narrow as columns of a batch are."""
    return torch.tensor(values, dtype=torch.int32 if largest <= torch.iinfo(torch.int32).max else torch.int64)


@settings(deadline=None, max_examples=100)
@given(records(), st.randoms())
@example({"sign": ((1 << 31) - 1, [(1 << 31) - 1, 0]), "one": (1, [1, 0])}, None)
@example({"32 bits": ((1 << 32) - 1, [(1 << 32) - 1, 1 << 31, 0])}, None)
@example({"62 bits": (MOST, [MOST, 1 << 61, 1 << 31, (1 << 31) - 1])}, None)
@example({"16 bits": (65_535, [65_535, 32_768]), "16 more": (65_535, [32_768, 65_535])}, None)
def test_what_comes_out_is_what_went_in(fields: dict[str, tuple[int, list[int]]], order: object) -> None:
    record = Record({name: largest for name, (largest, _) in fields.items()})
    columns = {name: column(values, largest) for name, (largest, values) in fields.items()}
    names = list(columns)
    if order is not None:
        order.shuffle(names)
    packed = record.pack({name: columns[name] for name in names})
    count = len(next(iter(columns.values())))
    assert packed.dtype == torch.int32
    assert packed.shape == (count, record.words)
    unpacked = record.unpack(packed)
    assert {name: values.tolist() for name, values in unpacked.items()} == {
        name: values for name, (_, values) in fields.items()
    }
    for name, (largest, _) in fields.items():
        # Columns of the search are int32, and int64 where that is too narrow.
        assert unpacked[name].dtype == (torch.int32 if largest.bit_length() < 32 else torch.int64)
    # No field takes more bits than its largest value has, and a word is not left before the next value needs another.
    bits = [max(1, largest.bit_length()) for largest, _ in fields.values()]
    pieces = sum(1 + (size > 31) for size in bits)
    assert -(-sum(bits) // 32) <= record.words <= pieces


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 31), min_size=1, max_size=8))
def test_two_words_are_never_less_than_half_full(widths: list[int]) -> None:
    """First fit: what is in a word did not fit into the words before it."""
    record = Record({str(number): (1 << width) - 1 for number, width in enumerate(widths)})
    assert record.words <= max(1, 2 * sum(max(1, width) for width in widths) // 32 + 1)


def test_what_needs_more_than_two_words_is_refused() -> None:
    with pytest.raises(AssertionError, match="wide: 4611686018427387904 needs more than two words"):
        Record({"wide": MOST + 1})
