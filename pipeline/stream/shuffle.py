"""The order of targets in a shuffle buffer."""

import numpy as np
from numpy.typing import NDArray

from pipeline.stream.plan import shuffle_keys

I64 = NDArray[np.int64]


def shuffled_order(user_T: I64, together: int | None, seed: int, epoch: int, block: int) -> I64:
    """Shuffle users and, where they are to be spread, their targets.

    With ``together`` = k, a user's targets are shuffled and dealt out in chunks of k: first one chunk of every user,
    then a second one of every user that has more, and so on, each time in the same order of users. So a user comes back
    only after all others: a batch holds at most k targets of a user while the users with targets left fill one batch.

    Args:
        user_T: (T,), users of the targets, ascending from 0.
        together: k; None: all targets of a user stay together.
        seed, epoch, block: decide the order, and nothing else does.

    Returns:
        (T,), the targets in their new order.
    """
    users = int(user_T[-1]) + 1 if len(user_T) else 0
    place_U = np.empty(users, np.int64)
    place_U[np.argsort(shuffle_keys(users, seed, epoch, block, 1), kind="stable")] = np.arange(users)
    if together is None:
        return np.argsort(place_U[user_T], kind="stable")
    shuffled_T = np.lexsort((shuffle_keys(len(user_T), seed, epoch, block, 2), user_T))
    # Shuffling within users leaves the users where they are: user_T holds for shuffled_T too.
    first_U = np.searchsorted(user_T, np.arange(users))
    chunk_T = (np.arange(len(user_T)) - first_U[user_T]) // together
    return shuffled_T[np.argsort(chunk_T * users + place_U[user_T], kind="stable")]
