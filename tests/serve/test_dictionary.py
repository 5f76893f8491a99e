"""Dense ids of raw values, against a Python dict."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.serve import dictionary
from pipeline.serve.dictionary import Dictionary, write_dictionary
from schemas.errors import UserError

INTEGERS = st.integers(-(2**63), 2**63 - 1)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)


def opened(path: Path, raw: pa.Array, ids: list[int]) -> Dictionary:
    write_dictionary(path, raw, np.array(ids, np.int32))
    return Dictionary.open(path)


def check(path: Path, known: dict[object, int], asked: list[object], kind: pa.DataType) -> None:
    found = opened(path, pa.array(list(known), kind), list(known.values())).ids(pa.array(asked, kind))
    assert found.dtype == np.int32
    assert found.tolist() == [known.get(value, 0) for value in asked]


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(INTEGERS, st.integers(1, 2**31 - 1), max_size=60), st.lists(INTEGERS | st.none(), max_size=20))
def test_integers(tmp_path_factory: pytest.TempPathFactory, known: dict[object, int], others: list[object]) -> None:
    check(tmp_path_factory.getbasetemp() / "integers", known, [*known, *others, 0], pa.int64())


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(TEXTS, st.integers(1, 2**31 - 1), max_size=60), st.lists(TEXTS | st.none(), max_size=20))
def test_texts(tmp_path_factory: pytest.TempPathFactory, known: dict[object, int], others: list[object]) -> None:
    check(tmp_path_factory.getbasetemp() / "texts", known, [*others, *known, ""], pa.string())


@settings(max_examples=50, deadline=None)
@given(texts=st.dictionaries(TEXTS, st.integers(1, 9), max_size=20), others=st.lists(TEXTS, max_size=9))
@pytest.mark.parametrize("hashes", [1, 3])
def test_texts_of_one_hash_are_told_apart(
    hashes: int, texts: dict[object, int], others: list[object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            dictionary,
            "_hashes",
            lambda values: np.array([len(str(each)) % hashes for each in values], np.uint64) << np.uint64(62),
        )
        check(tmp_path_factory.getbasetemp() / "collisions", texts, [*texts, *others], pa.string())


def test_lists_and_arrays_are_taken_and_other_types_are_not(tmp_path: Path) -> None:
    integers = opened(tmp_path / "integers", pa.array([7, -3]), [1, 2])
    assert integers.kind == "integer"
    assert integers.ids([-3, None, 7]).tolist() == [2, 0, 1]
    assert integers.ids(np.array([7, 8], np.int32)).tolist() == [1, 0]
    texts = opened(tmp_path / "texts", pa.array(["7", "x"]), [1, 2])
    assert (texts.kind, len(texts)) == ("text", 2)
    assert texts.ids(["x", "7", "é"]).tolist() == [2, 1, 0]
    for wrong in (["7"], [True], [7.5], [2**63], [b"7"]):
        with pytest.raises((OverflowError, TypeError)):
            integers.ids(wrong)
    for number in (7, 7.5, True):
        with pytest.raises(TypeError, match="text is asked for"):
            texts.ids([number])


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "no.arrow").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"no\.arrow cannot be read"):
        Dictionary.open(tmp_path / "no.arrow")
    with pa.OSFile(str(tmp_path / "other.arrow"), "wb") as file:
        table = pa.table({"raw_id": [1]})
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(UserError, match=r"other\.arrow is not a dictionary"):
        Dictionary.open(tmp_path / "other.arrow")
