"""The order of targets in a shuffle buffer."""

import numpy as np
from numpy.typing import NDArray

from pipeline.stream.plan import shuffle_keys

I64 = NDArray[np.int64]

ORDER = 2
"""Grows when `shuffled_order` changes: a place within an epoch means nothing in another order."""


def shuffled_order(user_T: I64, together: int | None, seed: int, epoch: int, block: int) -> I64:
    """Shuffle users and, where they are to be spread, their targets.

    With ``together`` = k, a user's targets are shuffled and dealt out in chunks of k at most, evenly over the whole
    buffer from a random beginning: of n chunks one in each n-th part of it. So each batch has users of all kinds, to
    the last one; dealt out in turns, the last batches would be of the few users with the most targets. A batch holds at
    most k targets of a user who has clearly fewer chunks than the buffer has batches.

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
    targets_U = np.bincount(user_T, minlength=users)
    chunks_U = -(-targets_U // together)
    chunk_T = (np.arange(len(user_T)) - first_U[user_T]) * chunks_U[user_T] // targets_U[user_T]
    part_T = (chunk_T + place_U[user_T] / users) / chunks_U[user_T]
    return shuffled_T[np.lexsort((place_U[user_T], part_T))]
