"""Counter-based random numbers, and hashes of values.

A value depends on its key alone, never on what was drawn before or by which thread.

N = values, I = items by dense id, the unknown 0 included, D = draws.
"""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

ATTEMPTS = 32
"""Times that an item is drawn anew before those that a user does not own are listed one by one."""
NOTHING_LEFT = -1
"""In the place of an item, where a user owns all that could be drawn."""

_WORD = 8
"""Bytes of a text that are mixed at a time."""


def mix(key: NDArray[Any], salt: int) -> U64:
    """SplitMix64's finaliser of ``key + salt`` times the golden ratio; integers in, uint64 of equal shape out."""
    # numpy's unsigned integers wrap around, as SplitMix64 wants; the salt is reduced in Python, where nothing
    # overflows. Salts count from 1 here: with nothing added, the key 0 would stay 0.
    golden = 0x9E3779B97F4A7C15
    z = key.astype(np.uint64) + np.uint64(golden * (salt + 1) % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hash_texts(values: pa.Array) -> U64:
    """64-bit hashes of texts, the same on every machine and in every version of this program.

    The hash begins as ``mix(length in bytes, 0)``. Then each word of 8 bytes, little-endian, the last one filled up
    with zeros, makes of it ``mix(hash xor word, number of the word from 1)``.

    Args:
        values: (N,) of Arrow's type string, as UTF-8; a null has the hash of the empty text.

    Returns:
        (N,) uint64.
    """
    assert values.type == pa.string(), values.type
    if not len(values):
        return np.zeros(0, np.uint64)
    _, offsets, content = values.buffers()
    offset = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1].astype(np.int64)
    text = np.frombuffer(content, np.uint8)[offset[0] : offset[-1]] if content is not None else np.zeros(0, np.uint8)
    # Words begin at any byte. Zeros behind the last text: its last word is read whole.
    text = np.concatenate([text, np.zeros(_WORD, np.uint8)])
    words: NDArray[Any] = np.ndarray((len(text) - _WORD + 1,), "<u8", text.data, strides=(1,))
    start, length = offset[:-1] - offset[0], np.diff(offset)
    hashed = mix(length, 0)
    shortest, longest = int(length.min()), int(length.max())
    for number in range(-(-longest // _WORD)):
        # Ids often have one length: then no text is picked out.
        all_longer = shortest > number * _WORD
        longer: Any = slice(None) if all_longer else np.flatnonzero(length > number * _WORD)
        word = words[start[longer] + number * _WORD].astype(np.uint64, copy=False)
        if shortest < (number + 1) * _WORD:
            unused = np.maximum((number + 1) * _WORD - length[longer], 0).astype(np.uint64) * np.uint64(8)
            word = (word << unused) >> unused
        hashed[longer] = mix(hashed[longer] ^ word, number + 1)
    return hashed


def hash_values(values: pa.Array) -> pa.Array:
    """Hashes of texts or integers without their last bit, so that they fit int64; nulls stay.

    A value's bucket of N is 1 + hash % N. Texts are hashed by `hash_texts`, an integer i is ``mix(i, 0)``.
    """
    missing = values.is_null().to_numpy(zero_copy_only=False)
    hashed = hash_texts(values) if values.type == pa.string() else mix(values.fill_null(0).to_numpy(), 0)
    return pa.array((hashed >> np.uint64(1)).astype(np.int64), mask=missing)


def draw_unowned(key_D: U64, user_D: I64, owned: I64, cumulative_I: I64, salt: int) -> I64:
    """Draw items in proportion to their weights, never one that its user owns.

    A draw depends on its key, its user's items, the weights and the salt alone.

    Args:
        key_D: of each draw.
        user_D: whose negative it is, from 0.
        owned: what each user owns, sorted: ``user * len(cumulative_I) + item``; what is there twice does no harm.
        cumulative_I: sum of the weights of all items up to and including this one; what has no weight is never drawn.
        salt: the first one that is mixed with the keys; `ATTEMPTS` further ones are.

    Returns:
        (D,) items; `NOTHING_LEFT` where there is none.
    """
    size = len(cumulative_I)
    item_D = np.zeros(len(key_D), np.int64)
    pending = np.arange(len(key_D))
    for attempt in range(ATTEMPTS):
        # Only refused draws are drawn again, with another salt: the others stay what they are.
        item_D[pending] = _draw(mix(key_D[pending], salt + attempt), cumulative_I)
        wanted = user_D[pending] * size + item_D[pending]
        place = np.minimum(np.searchsorted(owned, wanted), len(owned) - 1)
        pending = pending[owned[place] == wanted]
        if not len(pending):
            return item_D
    weight_I = np.diff(cumulative_I, prepend=0)
    for draw in pending:
        # A user who owns nearly all there is: draw from what is left, which is what rejection converges to.
        first, last = np.searchsorted(owned, [user_D[draw] * size, (user_D[draw] + 1) * size])
        rest_I = weight_I.copy()
        rest_I[owned[first:last] - user_D[draw] * size] = 0
        random = mix(key_D[draw : draw + 1], salt + ATTEMPTS)
        item_D[draw] = _draw(random, np.cumsum(rest_I))[0] if rest_I.any() else NOTHING_LEFT
    return item_D


def _draw(random: U64, cumulative_I: I64) -> I64:
    # The bias of the modulo is below one in 2^64 / sum of weights. With ``side="right"``, what has no weight has
    # an empty range and is never drawn.
    ticket = (random % np.uint64(cumulative_I[-1])).astype(np.int64)
    return np.searchsorted(cumulative_I, ticket, side="right")
