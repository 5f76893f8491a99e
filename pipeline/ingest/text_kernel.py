"""Hashes of texts, and which texts came before, compiled: other threads work beside it.

N = texts, S = slots of the memory, W = words of 8 bytes that a slot has, B = texts of a block.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.compiled import compiled
from pipeline.hashing import U64

# Everything is unsigned: numba would look whether an index is below 0, at a third of the time.
_U = np.uint64
_WORD = np.uint64(8)
"""Bytes of a word."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_TOGETHER = 128
"""Texts whose slots are fetched together."""


@compiled()
def _finalized(z: np.uint64) -> np.uint64:
    # `pipeline.hashing.mix` of a number to which the salt has been added.
    z = (z ^ (z >> _U(30))) * _U(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> _U(27))) * _U(0x94D049BB133111EB)
    return z ^ (z >> _U(31))


@compiled()
def _last_word(content: NDArray[np.uint8], words: U64, start: np.uint64, end: np.uint64) -> np.uint64:
    """The word of the bytes ``start`` .. ``end``, fewer than 8, filled up with zeros."""
    if start < _U(len(words)):
        return _U(words[start] & ((_U(1) << (_WORD * (end - start))) - _U(1)))
    # Near the end of the content, where no whole word begins.
    word, shift = _U(0), _U(0)
    while start < end:
        word |= _U(content[start]) << shift
        shift += _WORD
        start += _U(1)
    return word


@compiled()
def hash_into(hash_N: U64, content: NDArray[np.uint8], words: U64, offset_N: NDArray[np.int32]) -> None:
    """Hash texts as `pipeline.hashing.hash_texts` does.

    Args:
        hash_N: is overwritten with the hashes.
        content: bytes of the texts.
        words: `words_of` the content.
        offset_N: (N + 1,), where each text begins, and the end of the last one.
    """
    for index in range(len(hash_N)):
        start, end = _U(offset_N[_U(index)]), _U(offset_N[_U(index) + _U(1)])
        hashed = _finalized(end - start + _GOLDEN)
        salt = _GOLDEN + _GOLDEN
        while start + _WORD <= end:
            hashed = _finalized((hashed ^ words[start]) + salt)
            start += _WORD
            salt += _GOLDEN
        if start < end:
            hashed = _finalized((hashed ^ _last_word(content, words, start, end)) + salt)
        hash_N[_U(index)] = hashed


@compiled()
def remember(
    memory_SW: U64,
    place: np.uint64,
    content: NDArray[np.uint8],
    words: U64,
    offset_N: NDArray[np.int32],
    missing_N: NDArray[np.bool_],
    hash_N: U64,
    new_N: NDArray[np.int32],
) -> int:
    """Find texts that the memory does not have; they take the slots of others.

    Args:
        memory_SW: (S, 1 + W), S a power of two; of a text, ``place`` + its length in bytes, and its words. 0: nothing.
            Texts that have more words are never remembered.
        place: not 0, and the same for texts of one column alone, whatever their lengths.
        content: as in `hash_into`.
        words: as in `hash_into`.
        offset_N: as in `hash_into`.
        missing_N: which texts are none; with no entry, all are some.
        hash_N: from `hash_into`.
        new_N: (N,), its first entries are overwritten with the indices of texts that were not remembered.

    Returns:
        How many were not.
    """
    new = 0
    slot_words, longest = _U(memory_SW.shape[1]), _WORD * _U(memory_SW.shape[1] - 1)
    last_slot, memory = _U(memory_SW.shape[0] - 1), memory_SW.reshape(-1)
    at_B, seen_B = np.empty(_TOGETHER, np.uint64), np.empty(_TOGETHER, np.uint64)
    for block in range(0, len(hash_N), _TOGETHER):
        count = min(_TOGETHER, len(hash_N) - block)
        for index in range(count):
            # Nothing decides here, so that processors wait for many slots at a time: most are in no cache.
            at_B[index] = (hash_N[_U(block + index)] & last_slot) * slot_words
            seen_B[index] = memory[at_B[index]]
        for index in range(count):
            text = _U(block + index)
            if len(missing_N) and missing_N[text]:
                continue
            first, end, at = _U(offset_N[text]), _U(offset_N[text + _U(1)]), at_B[index]
            same = end - first <= longest
            if same:
                same = memory[at] == place + (end - first)
                start, to = first, at + _U(1)
                while start + _WORD <= end:
                    same &= memory[to] == words[start]
                    start += _WORD
                    to += _U(1)
                if start < end:
                    same &= memory[to] == _last_word(content, words, start, end)
                if not same:
                    memory[at] = place + (end - first)
                    start, to = first, at + _U(1)
                    while start + _WORD <= end:
                        memory[to] = words[start]
                        start += _WORD
                        to += _U(1)
                    if start < end:
                        memory[to] = _last_word(content, words, start, end)
            if not same:
                new_N[new] = text
                new += 1
    return new


def words_of(content: NDArray[np.uint8]) -> NDArray[Any]:
    """The word of 8 bytes, little-endian, that begins at each byte, as far as there are whole ones."""
    word = int(_WORD)
    if len(content) <= word:
        # Of fewer than two words numpy says that they are aligned, and numba would compile once more.
        content = np.concatenate([content, np.zeros(word + 1, np.uint8)])
        content.flags.writeable = False
    return np.ndarray((len(content) - word + 1,), "<u8", content.data, strides=(1,))
