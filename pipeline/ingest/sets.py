"""Several raw values of one place as one text: equal sets are equal texts, so that engines group and join them.

N = places, E = values of all places.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.ingest.values import WrongValueError, texts

_BETWEEN, _ESCAPE = "\x1f", "\x1e"
"""What stands between the values of a set, and what stands for the two within a value."""


def encoded_sets(values: pa.Array, separator: str | None, convert: Callable[[pa.Array], pa.Array]) -> pa.Array:
    """The distinct values of each place, sorted, as one text; null where there is none.

    Args:
        values: (N,), lists, or texts in which ``separator`` stands between values.
        separator: None where ``values`` are lists.
        convert: makes integers or texts of (E,) raw values, null where one is missing: those are in no set.

    Raises:
        WrongValueError: of ``convert``, with the index of the place.
    """
    if separator is not None:
        # Most texts come again and again: each is cut once.
        coded = texts(values).dictionary_encode()
        of_each = _of_lists(pc.split_pattern(coded.dictionary, separator), convert, coded.indices)
        return of_each.take(coded.indices)
    if isinstance(values.type, pa.DictionaryType):
        values = values.dictionary_decode()
    if pa.types.is_null(values.type):  # a column in which no line has a value
        values = values.cast(pa.list_(pa.string()))
    return _of_lists(values, convert, None)


def decoded_sets(encoded: pa.Array) -> pa.Array:
    """Lists of the values that `encoded_sets` has put together, as texts."""
    lists = pc.split_pattern(encoded, _BETWEEN)
    values = pc.replace_substring(lists.flatten(), _ESCAPE + "1", _BETWEEN)
    values = pc.replace_substring(values, _ESCAPE + "0", _ESCAPE)
    return pa.ListArray.from_arrays(lists.offsets, values)


def _of_lists(lists: pa.Array, convert: Callable[[pa.Array], pa.Array], index_of: pa.Array | None) -> pa.Array:
    length = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    parent_E = np.repeat(np.arange(len(lists)), length)
    try:
        value_E = convert(lists.flatten())
    except WrongValueError as wrong:
        place = int(parent_E[wrong.index])
        # Of texts that were cut once, the first place that has this one.
        wrong.index = place if index_of is None else pc.index(index_of, pa.scalar(place, index_of.type)).as_py()
        raise
    known_E = value_E.is_valid()
    parent_E = parent_E[known_E.to_numpy(zero_copy_only=False)]
    # Sorted by place, then by value; integers by size, texts by their bytes.
    coded = value_E.filter(known_E).dictionary_encode()
    rank = np.empty(len(coded.dictionary), np.int64)
    rank[pc.sort_indices(coded.dictionary).to_numpy()] = np.arange(len(rank))
    rank_E = rank[coded.indices.to_numpy()]
    order = np.lexsort((rank_E, parent_E))
    rank_E, parent_E = rank_E[order], parent_E[order]
    new_E = np.ones(len(order), bool)
    new_E[1:] = (rank_E[1:] != rank_E[:-1]) | (parent_E[1:] != parent_E[:-1])
    words = pc.replace_substring(coded.dictionary.cast(pa.string()), _ESCAPE, _ESCAPE + "0")
    words = pc.replace_substring(words, _BETWEEN, _ESCAPE + "1")
    word_E = words.take(coded.indices.take(pa.array(order[new_E])))
    offsets = _offsets(parent_E[new_E], len(lists))
    together = pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets), word_E), _BETWEEN)
    return pc.if_else(pa.array(np.diff(offsets) == 0), pa.scalar(None, pa.string()), together)


def _offsets(parent_E: NDArray[Any], count: int) -> NDArray[np.int32]:
    return np.searchsorted(parent_E, np.arange(count + 1)).astype(np.int32)
