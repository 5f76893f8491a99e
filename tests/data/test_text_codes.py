"""Texts whose hashes are equal stay apart, and codes change no byte of a data set."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.hashing import hash_texts
from pipeline.ingest.definition import USER_KEY_RANGE
from pipeline.ingest.prepare import prepare
from pipeline.ingest.text_codes import TextCodes
from schemas.prepare import PrepareSettings
from schemas.storage import sha256


def colliding(prefix: str) -> tuple[str, str]:
    """Two texts whose codes leave the same remainder, so that their users have one key."""
    texts = [f"{prefix} {number}" for number in range(200_000)]
    rest = (hash_texts(pa.array(texts)) >> np.uint64(1)) % np.uint64(USER_KEY_RANGE)
    order = np.argsort(rest, kind="stable")
    first = np.flatnonzero(np.diff(rest[order]) == 0)[0]
    return texts[order[first]], texts[order[first + 1]]


def data_set(folder: Path, out: Path) -> dict[str, str]:
    brands = {"name": "brand", "of": "item", "column": "brand", "file": str(folder / "items.csv")}
    content = {
        "events": {"files": [str(folder / "events.csv")], "user_type": "text", "item_type": "text"},
        "features": [brands, {"name": "kind", "of": "behavior", "column": "kind"}],
        "split": {"kind": "by_timestamp", "min_history": 3},
    }
    content["events"]["category_id"] = None
    prepare(PrepareSettings.model_validate(content), out)
    return {path.name: sha256(path) for path in out.iterdir()}


def test_texts_that_share_a_code_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    users, items = [*colliding("user"), "u", "é"], [*colliding("item"), *(f"i{number}" for number in range(30))]
    kinds = [*colliding("kind"), "", "k" * 100, "k" * 101]
    lines = [
        f"{users[number % 4]},{items[number * number % 32]},{1_500_000_000 + number // 3},{kinds[number % 5]}"
        for number in range(400)
    ]
    (tmp_path / "events.csv").write_text("\n".join(["user_id,item_id,timestamp,kind", *lines]), encoding="utf-8")
    # One of the items comes with an earlier file, where it is alone.
    brands = [f"{item},brand {number % 3}" for number, item in enumerate(items) if number]
    (tmp_path / "items.csv").write_text("\n".join(["item_id,brand", *brands]), encoding="utf-8")
    expected = data_set(tmp_path, tmp_path / "expected")

    def weak(*arguments: Any, **more: Any) -> tuple[np.ndarray, np.ndarray]:
        code_N, new_N = coded(*arguments, **more)
        return code_N % USER_KEY_RANGE, new_N

    moved = []
    move, coded = TextCodes.move, TextCodes._coded
    monkeypatch.setattr(TextCodes, "_coded", weak)
    monkeypatch.setattr(TextCodes, "move", lambda self, *what: (moved.append(what[:2]), move(self, *what))[0])
    assert data_set(tmp_path, tmp_path / "weak") == expected
    assert {column for column, _ in moved} == {"user_id", "item_id", "f_kind"}
    assert ("item_id", items[0]) in moved, "the earlier file's item keeps its code"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.text("ab\0é", max_size=60) | st.none(), max_size=40), max_size=5), st.booleans())
def test_every_text_is_written_with_its_code(batches: list[list[str | None]], repeated: bool) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        # So few places that texts drive each other out.
        patch.setattr("pipeline.ingest.text_codes._SLOTS", 4)
        codes = TextCodes(Path(folder))
        code_of: dict[str, int] = {}
        for batch in batches:
            values = pa.array(batch, pa.string())
            coded = codes.code("column", values.dictionary_encode() if repeated else values).to_pylist()
            for text, code in zip(batch, coded, strict=True):
                assert (text is None) == (code is None)
                if text is not None and code is not None:
                    assert code == int(hash_texts(pa.array([text]))[0]) >> 1
                    assert code_of.setdefault(text, code) == code
        written = {}
        for path in codes.finish().values():
            with pa.ipc.open_stream(path.read_bytes()) as reader:
                written.update({row["text"]: row["code"] for row in reader.read_all().to_pylist()})
        assert written == code_of, json.dumps(batches)
