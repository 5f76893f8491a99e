"""Dense ids of raw values: a file that is mapped into memory and searched where it lies, without a table in memory.

Entries are sorted by the hash of their raw value. Hashes are spread evenly, so an entry's hash says about where it is:
entry i also says at which entry the values begin whose hash is the i-th N-th part of all hashes, or more.

N = entries, X = values that are asked for, E = entries that may be theirs, S = those whose hash is the value's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.hashing import hash_texts, mix
from schemas.errors import UserError
from schemas.served import REMEDY
from schemas.shards import RawType, raw_type

U64 = NDArray[np.uint64]
I32 = NDArray[np.int32]


def schema_of(kind: RawType) -> pa.Schema:
    """Arrow schema of the file of a dictionary whose raw values are integers or text."""
    return pa.schema(
        [
            pa.field("raw_id", raw_type(kind), nullable=False),
            pa.field("id", pa.int32(), nullable=False),
            pa.field("hash", pa.uint64(), nullable=False),
            pa.field("first", pa.int32(), nullable=False),
        ]
    )


def write_dictionary(path: Path, raw: pa.Array, id_N: I32) -> None:
    """Write a dictionary. Equal entries give equal bytes.

    Args:
        path: of the file.
        raw: (N,) int64 or string, different values, none of them null.
        id_N: the dense id of each, 1 or more.
    """
    hash_N = _hashes(raw)
    order_N = np.argsort(hash_N, kind="stable")
    hash_N = hash_N[order_N]
    first_N = np.searchsorted(_part(hash_N, len(raw)), np.arange(len(raw), dtype=np.uint64))
    kind: RawType = "text" if raw.type == pa.string() else "integer"
    columns = [raw.take(pa.array(order_N)), id_N[order_N], hash_N, first_N.astype(np.int32)]
    table = pa.table([pa.chunked_array([pa.array(column)]) for column in columns], schema_of(kind))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


class Dictionary:
    """Raw values and their dense ids. Opening one reads nothing but its header; many threads may read it at once."""

    def __init__(self, table: pa.Table) -> None:
        self.kind: RawType = "text" if table.schema.field("raw_id").type == pa.string() else "integer"
        """What its raw values are."""
        raw, *columns = (_one(table[name]) for name in ("raw_id", "id", "hash", "first"))
        self._raw: pa.Array = raw
        self._id_N, self._hash_N, self._first_N = (column.to_numpy() for column in columns)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the file of a dictionary, whose checksum the caller has verified.

        Raises:
            UserError: it cannot be read, or is none.
        """
        table = mapped_table(path)
        if table.schema not in (schema_of("text"), schema_of("integer")):
            raise UserError(f"{path} is not a dictionary; {REMEDY}")
        return cls(table)

    def __len__(self) -> int:
        return len(self._raw)

    def ids(self, values: pa.Array | NDArray[Any] | Sequence[Any]) -> I32:
        """Return the dense ids of raw values.

        Args:
            values: (X,) integers, or text where `kind` says so; None or null where one is missing.

        Returns:
            int32 (X,); 0 for what is missing, or is not in the dictionary.

        Raises:
            TypeError: values of another type: an integer is not taken for text, nor text for the integer in it.
            OverflowError: an integer beyond 64 bits.
            pa.ArrowException: values of different types.
        """
        asked = values if isinstance(values, pa.Array) else pa.array(values)
        if asked.type != self._raw.type:
            taken = pa.types.is_large_string if self.kind == "text" else pa.types.is_integer
            if not (taken(asked.type) or pa.types.is_null(asked.type)):
                wanted = "text is" if self.kind == "text" else "integers are"
                raise TypeError(f"{wanted} asked for, not {asked.type}")
            asked = asked.cast(self._raw.type)
        id_X = np.zeros(len(asked), np.int32)
        if not len(asked) or not len(self._raw):
            return id_X
        hash_X = _hashes(asked)
        # Where the entries of like hashes begin, and where those that follow do.
        part_X = _part(hash_X, len(self._raw)).astype(np.int64)
        first_X = self._first_N.take(part_X)
        last_X = np.where(part_X + 1 < len(self._raw), self._first_N.take(part_X + 1, mode="clip"), len(self._raw))
        # All of these are looked at together: about two for each value.
        entries_X = np.where(_missing(asked), 0, last_X - first_X)
        value_E = np.repeat(np.arange(len(asked)), entries_X)
        entry_E = np.arange(len(value_E)) + np.repeat(first_X - (np.cumsum(entries_X) - entries_X), entries_X)
        alike_S = np.flatnonzero(self._hash_N.take(entry_E) == hash_X.take(value_E))
        value_S, entry_S = value_E.take(alike_S), entry_E.take(alike_S)
        if self.kind == "text":
            # An integer's hash is its own alone; two texts may share one.
            same_S = pc.equal(self._raw.take(pa.array(entry_S)), asked.take(pa.array(value_S)))
            same_S = same_S.to_numpy(zero_copy_only=False)
            value_S, entry_S = value_S[same_S], entry_S[same_S]
        id_X[value_S] = self._id_N.take(entry_S)
        return id_X


def mapped_table(path: Path) -> pa.Table:
    """A file of Arrow, mapped into memory and not read.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); {REMEDY}") from None


def _one(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array, on the map where the file has it as one."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _hashes(values: pa.Array) -> U64:
    """The hash of each value, uint64, spread over all its values; anything where one is missing."""
    return hash_texts(values) if values.type == pa.string() else mix(values.fill_null(0).to_numpy(), 0)


def _missing(values: pa.Array) -> NDArray[np.bool_]:
    missing: NDArray[np.bool_] = values.is_null().to_numpy(zero_copy_only=False)
    return missing


def _part(hash_X: U64, parts: int) -> U64:
    """Which of so many equal parts of all hashes each lies in, from 0: never less for a larger hash."""
    # Of the upper half alone, so that the product fits.
    return (hash_X >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32)
