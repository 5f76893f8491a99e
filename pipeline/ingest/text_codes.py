"""Numbers in the place of texts: what an engine that sorts, groups and joins integers faster than texts computes with.

A text's code is its hash of 63 bits, the same in every log. Texts whose hashes are equal get codes of their own; no two
texts of a column ever share one.

N = values, S = slots of the memory, W = words of 8 bytes that a slot has.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.ingest.definition import USER_KEY_RANGE

SCHEMA = pa.schema([pa.field("code", pa.int64()), pa.field("text", pa.string())])
"""What files of texts have, a line for each text."""

_SLOTS = 1 << 20
"""Texts that are remembered at most; a power of two."""
_WORDS = 7
"""Words of a remembered text; longer ones are not remembered. With what else a slot has, it fills a cache line."""


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
        self._memory_SW = np.zeros((_SLOTS, 1 + _WORDS), np.uint64)

    def code(self, column: str, values: pa.Array, *, written: bool = False) -> pa.Array:
        """Codes of texts, int64; nulls stay.

        Args:
            column: what the texts are; each has texts of its own.
            values: (N,) texts, dictionary-encoded or not.
            written: all of them have been written.
        """
        if isinstance(values, pa.DictionaryArray):
            return self.code(column, values.dictionary, written=written).take(values.indices)
        missing_N = values.is_null().to_numpy(zero_copy_only=False) if values.null_count else None
        code_N, new = self._coded(column, values, missing_N, written=written)
        codes = self._with_moved(column, values, pa.array(code_N, mask=missing_N))
        if len(new):
            if column not in self._writers:
                self._writers[column] = pa.ipc.new_stream(str(self._path(column)), SCHEMA)
            self._writers[column].write_batch(pa.record_batch([codes.take(new), values.take(new)], schema=SCHEMA))
        return codes

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

    def _coded(
        self, column: str, values: pa.Array, missing_N: NDArray[np.bool_] | None, *, written: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Codes by hash alone, and, unless all are ``written``, indices of texts that may not have been written yet."""
        # Imported only here: it takes a while, and logs without texts have no use for it.
        from pipeline.ingest.text_kernel import hash_into, remember, words_of

        if not len(values):
            return np.zeros(0, np.int64), np.zeros(0, np.int32)
        _, offsets, buffer = values.buffers()
        offset_N = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1]
        content = np.frombuffer(b"" if buffer is None else buffer, np.uint8)
        # Of both kinds numba would compile one more.
        offset_N.flags.writeable = content.flags.writeable = False
        words = words_of(content)
        hash_N, new_N = np.empty(len(values), np.uint64), np.empty(len(values), np.int32)
        hash_into(hash_N, content, words, offset_N)
        new = 0
        if not written:
            # Lengths of texts are below 2^32.
            place = np.uint64((1 + self._columns.setdefault(column, len(self._columns))) << 32)
            missing = np.zeros(0, bool) if missing_N is None else missing_N
            new = remember(self._memory_SW, place, content, words, offset_N, missing, hash_N, new_N)
        return (hash_N >> np.uint64(1)).view(np.int64), new_N[:new]

    def _with_moved(self, column: str, values: pa.Array, codes: pa.Array) -> pa.Array:
        moved = self._moved.get(column)
        if not moved:
            return codes
        index = pc.index_in(values, pa.array(list(moved), pa.string()))
        return pc.coalesce(pa.array(list(moved.values()), pa.int64()).take(index), codes)
