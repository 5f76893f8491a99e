"""Numbers in the place of texts: what an engine that sorts, groups and joins integers faster than texts computes with.

A text's code is its hash of 63 bits, the same in every log. Texts whose hashes are equal get codes of their own; no two
texts of a column ever share one.

N = values, W = words of 8 bytes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.hashing import U64, hash_texts
from pipeline.ingest.definition import USER_KEY_RANGE

SCHEMA = pa.schema([pa.field("code", pa.int64()), pa.field("text", pa.string())])
"""What files of texts have, a line for each text."""

_SLOTS = 1 << 20
"""Texts that are remembered at most."""
_WORDS = 5
"""Words of a remembered text; longer ones are not remembered."""
_PIECE = 1 << 18
"""Texts that are hashed at a time."""


class TextCodes:
    """Gives codes to texts, and writes every text to a file at least once, seldom much oftener.

    Args:
        folder: of the files; must exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._moved: dict[str, dict[str, int]] = {}
        self._columns: dict[str, int] = {}
        self._writers: dict[str, pa.ipc.RecordBatchStreamWriter] = {}
        self.forget()

    def forget(self) -> None:
        """Take all texts for new ones from now on."""
        # What stands in a slot: 1 + column and length of a text, and its words. 0: nothing.
        self._place_S = np.zeros(_SLOTS, np.int64)
        self._words_WS = np.zeros((_WORDS, _SLOTS), np.uint64)
        self._taker_S = np.zeros(_SLOTS, np.int32)

    def code(self, column: str, values: pa.Array, *, written: bool = False) -> pa.Array:
        """Codes of texts, int64; nulls stay.

        Args:
            column: what the texts are; each has texts of its own.
            values: (N,) texts, dictionary-encoded or not.
            written: all of them have been written.
        """
        if isinstance(values, pa.DictionaryArray):
            return self.code(column, values.dictionary, written=written).take(values.indices)
        starts = range(0, len(values), _PIECE)
        pieces = [self._code(column, values[start : start + _PIECE], written=written) for start in starts]
        return pa.concat_arrays(pieces) if pieces else pa.nulls(0, pa.int64())

    def move(self, column: str, text: str, code: int) -> None:
        """Give a text that has a code, as another one of its column has, the next one."""
        # Users go by the remainder of their hash: it must stay.
        after = code + USER_KEY_RANGE
        self._moved.setdefault(column, {})[text] = after if after < 2**63 else after % USER_KEY_RANGE

    def finish(self) -> dict[str, Path]:
        """End the present files; the next text begins new ones. Returns the files by column."""
        for writer in self._writers.values():
            writer.close()
        files = {column: self._path(column) for column in self._writers}
        self._writers.clear()
        return files

    def _path(self, column: str) -> Path:
        return self._folder / f"texts_{column}.arrows"

    def _code(self, column: str, values: pa.Array, *, written: bool) -> pa.Array:
        number = self._columns.setdefault(column, len(self._columns))
        words_WN = np.zeros((_WORDS, len(values)), np.uint64)
        hash_N = hash_texts(values, words_WN)
        code_N = (hash_N >> np.uint64(1)).astype(np.int64)
        missing_N = values.is_null().to_numpy(zero_copy_only=False)
        codes = self._with_moved(column, values, pa.array(code_N, mask=missing_N))
        if written:
            return codes
        new = self._not_remembered(number, values, missing_N, hash_N, words_WN)
        if len(new):
            if column not in self._writers:
                self._writers[column] = pa.ipc.new_stream(str(self._path(column)), SCHEMA)
            self._writers[column].write_batch(pa.record_batch([codes.take(new), values.take(new)], schema=SCHEMA))
        return codes

    def _not_remembered(
        self, number: int, values: pa.Array, missing_N: NDArray[np.bool_], hash_N: U64, words_WN: U64
    ) -> NDArray[np.int64]:
        """Indices of texts that may not have been written yet, each of these at least once; they are remembered."""
        slot_N = (hash_N & np.uint64(_SLOTS - 1)).astype(np.int64)
        length_N = pc.fill_null(pc.binary_length(values), 0).to_numpy().astype(np.int64)
        place_N = (number << 32) + length_N + 1
        fits_N = length_N <= 8 * _WORDS
        # Of texts of one length, words behind its end are equal.
        words = [*zip(words_WN, self._words_WS, strict=True)][: -(-int(length_N.max()) // 8)]

        def differs(index: Any) -> NDArray[np.bool_]:
            slot = slot_N[index]
            same: NDArray[np.bool_] = (self._place_S[slot] == place_N[index]) & fits_N[index]
            for word_N, word_S in words:
                same &= word_S[slot] == word_N[index]
            return ~same

        new = np.flatnonzero(differs(slice(None)) & ~missing_N)
        # Of several texts in one slot one takes it, as a whole.
        fitting = new[fits_N[new]]
        self._taker_S[slot_N[fitting]] = fitting
        taking = fitting[self._taker_S[slot_N[fitting]] == fitting]
        slot = slot_N[taking]
        self._place_S[slot] = place_N[taking]
        for word_N, word_S in words:
            word_S[slot] = word_N[taking]
        return np.concatenate([taking, new[differs(new)]])

    def _with_moved(self, column: str, values: pa.Array, codes: pa.Array) -> pa.Array:
        moved = self._moved.get(column)
        if not moved:
            return codes
        index = pc.index_in(values, pa.array(list(moved), pa.string()))
        return pc.coalesce(pa.array(list(moved.values()), pa.int64()).take(index), codes)
