"""Counter-based random numbers: a value depends on its key alone, never on what was drawn before or by which thread."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]


def mix(key: NDArray[Any], salt: int) -> U64:
    """SplitMix64's finaliser of ``key + salt`` times the golden ratio; integers in, uint64 of equal shape out."""
    # numpy's unsigned integers wrap around, as SplitMix64 wants; the salt is reduced in Python, where nothing
    # overflows. Salts count from 1 here: with nothing added, the key 0 would stay 0.
    golden = 0x9E3779B97F4A7C15
    z = key.astype(np.uint64) + np.uint64(golden * (salt + 1) % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
