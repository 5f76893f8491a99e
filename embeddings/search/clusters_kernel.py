"""The CPU's clustering of windows, as `embeddings.search.clusters` defines it. Compiled on first use, kept on disk.

T = targets, M = behaviours of all users, D = dim of what is compared, W = (target, behaviour) pairs, n = behaviours of
a window.
"""

import numpy as np
from numpy.typing import NDArray

from embeddings.compiled import compiled

SUMS = {"reassoc", "contract", "nsz"}
"""Liberties that the compiler may take with a sum's order; without them it does not use vectors."""


@compiled()
def log_counts(
    rows_MD: NDArray[np.float32],
    start_T: NDArray[np.int64],
    end_T: NDArray[np.int64],
    first_pair_T: NDArray[np.int64],
    size: int,
    tie: float,
    out_W: NDArray[np.float32],
) -> None:
    """Write the logarithm of how many behaviours each one stands for; -inf where another one stands for it.

    Args:
        rows_MD: the rows whose distances make the clusters, contiguous.
        start_T: where each window begins.
        end_T: where it ends.
        first_pair_T: its first pair in ``out_W``.
        size: the most behaviours of a cluster.
        tie: the part of themselves by which equal distances may differ.
        out_W: for all pairs.
    """
    longest = (end_T - start_T).max() if len(start_T) else 0
    index_n, along_n = np.empty(longest, np.int64), np.empty(longest, np.float32)
    middle_D, way_D = np.empty(rows_MD.shape[1], np.float32), np.empty(rows_MD.shape[1], np.float32)
    begin_n, stop_n = np.empty(longest + 1, np.int64), np.empty(longest + 1, np.int64)
    for t in range(len(start_T)):
        first, length = first_pair_T[t], end_T[t] - start_T[t]
        out_W[first : first + length] = -np.inf
        index_n[:length] = np.arange(start_T[t], end_T[t])
        # Clusters that are yet to be split wait on a stack, as ranges of `index_n`: a cluster is always one range.
        waiting = 0
        if length:
            begin_n[0], stop_n[0], waiting = 0, length, 1
        while waiting:
            waiting -= 1
            begin, stop = begin_n[waiting], stop_n[waiting]
            cluster_n = index_n[begin:stop]
            _mean(rows_MD, cluster_n, middle_D)
            _distances(rows_MD, cluster_n, middle_D, along_n)
            # Small enough: its behaviour nearest to the middle stands for it, and all others keep -inf.
            if stop - begin <= size:
                for i in range(stop - begin):
                    along_n[i] = -along_n[i]
                stands = cluster_n[_largest(along_n, stop - begin, tie)]
                out_W[first + stands - start_T[t]] = np.log(np.float32(stop - begin))
                continue
            # Too large: halve it along the line between two extremes.
            one = cluster_n[_largest(along_n, stop - begin, tie)]
            _distances(rows_MD, cluster_n, rows_MD[one], along_n)
            other = cluster_n[_largest(along_n, stop - begin, tie)]
            for d in range(rows_MD.shape[1]):
                way_D[d] = rows_MD[other, d] - rows_MD[one, d]
            _products(rows_MD, cluster_n, way_D, along_n)
            # A stable sort, as in `clusters.in_torch`: of equal products the earlier behaviour is in the first half.
            order = np.argsort(along_n[: stop - begin], kind="mergesort")
            half = (stop - begin + 1) // 2
            split_n = cluster_n[order]
            # Back in order of time, because `_largest` decides ties for the earliest.
            index_n[begin : begin + half] = np.sort(split_n[:half])
            index_n[begin + half : stop] = np.sort(split_n[half:])
            begin_n[waiting], stop_n[waiting] = begin, begin + half
            begin_n[waiting + 1], stop_n[waiting + 1] = begin + half, stop
            waiting += 2


@compiled()
def _mean(rows_MD: NDArray[np.float32], index_n: NDArray[np.int64], out_D: NDArray[np.float32]) -> None:
    out_D[:] = 0
    for m in index_n:
        for d in range(len(out_D)):
            out_D[d] += rows_MD[m, d]
    for d in range(len(out_D)):
        out_D[d] /= np.float32(len(index_n))


@compiled(fastmath=SUMS)
def _distances(
    rows_MD: NDArray[np.float32],
    index_n: NDArray[np.int64],
    point_D: NDArray[np.float32],
    out_n: NDArray[np.float32],
) -> None:
    for i in range(len(index_n)):
        total = np.float32(0)
        for d in range(len(point_D)):
            total += (rows_MD[index_n[i], d] - point_D[d]) ** 2
        out_n[i] = total


@compiled(fastmath=SUMS)
def _products(
    rows_MD: NDArray[np.float32],
    index_n: NDArray[np.int64],
    way_D: NDArray[np.float32],
    out_n: NDArray[np.float32],
) -> None:
    for i in range(len(index_n)):
        total = np.float32(0)
        for d in range(len(way_D)):
            total += rows_MD[index_n[i], d] * way_D[d]
        out_n[i] = total


@compiled()
def _largest(value_n: NDArray[np.float32], count: int, tie: float) -> int:
    """The earliest of those that are as large as the largest."""
    largest = value_n[:count].max()
    enough = largest - np.float32(tie) * abs(largest)
    for i in range(count):
        if value_n[i] >= enough:
            return i
    return 0  # not a number
