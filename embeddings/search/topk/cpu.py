"""Top-K search on the CPU: nothing of size (N, D) or (T, N) is written.

R = rows of the table, D = dim, M = ids of all users, T = targets, W = sum of window lengths, K = kept,
U = units of work: targets whose windows overlap, up to a limit, so that they share what the caches hold.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embeddings.search.topk import cpu_kernel

TARGETS_TOGETHER = 64
"""Most targets of a unit."""
PARTS_PER_THREAD = 4
"""So that a thread that the system interrupts does not keep all others waiting."""
WORTH_THREADS = 1 << 16
"""Multiplications; fewer are done before another thread has woken up."""

_AS_INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.uint16}


def top_k_cpu(
    rows_RD: Tensor,
    ids_M: Tensor,
    start_T: Tensor,
    end_T: Tensor,
    query_TD: Tensor,
    additive_W: Tensor,
    k: int,
    scale_R: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `embeddings.search.topk.api.top_k`, which has checked the arguments; as many threads as torch uses."""
    targets = len(start_T)
    score_TK = torch.empty(targets, k)
    index_TK = torch.empty(targets, k, dtype=torch.int64)
    threads = torch.get_num_threads() if len(additive_W) * rows_RD.shape[1] >= WORTH_THREADS else 1
    start, end = start_T.numpy(), end_T.numpy()
    length_T = end - start
    order_T, unit_U = _units(start, end, min(TARGETS_TOGETHER, -(-targets // threads)))
    rows_RD = rows_RD if rows_RD.stride(1) == 1 else rows_RD.contiguous()
    arguments = (
        rows_RD.view(_AS_INTEGERS.get(rows_RD.dtype, rows_RD.dtype)).numpy(),
        rows_RD.stride(0) * rows_RD.itemsize,
        np.empty(0, np.float32) if scale_R is None else scale_R.contiguous().numpy(),
        ids_M.contiguous().numpy(),
        start,
        end,
        length_T.cumsum() - length_T,
        query_TD.float().contiguous().numpy(),
        additive_W.contiguous().numpy(),
        order_T,
        unit_U,
    )

    def search(begin: int, end: int) -> None:
        cpu_kernel.search(*arguments, begin, end, score_TK.view(torch.int32).numpy(), index_TK.numpy())

    if threads == 1:
        search(0, len(unit_U) - 1)
    else:
        cut_P = _parts(length_T[order_T], unit_U, threads * PARTS_PER_THREAD)
        list(_pool(os.getpid(), threads).map(search, cut_P[:-1], cut_P[1:]))
    return score_TK, index_TK


def _units(
    start_T: NDArray[np.int64], end_T: NDArray[np.int64], together: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Targets unit by unit, and (U + 1,) where each unit begins; a unit has at most ``together`` targets."""
    order_T = np.argsort(start_T, kind="stable")
    place_T = np.arange(len(order_T))
    alone_T = np.ones(len(order_T), bool)
    alone_T[1:] = start_T[order_T][1:] >= np.maximum.accumulate(end_T[order_T])[:-1]
    in_group_T = place_T - np.maximum.accumulate(np.where(alone_T, place_T, 0))
    return order_T, np.append(place_T[in_group_T % max(together, 1) == 0], len(order_T))


def _parts(length_T: NDArray[np.int64], unit_U: NDArray[np.int64], parts: int) -> list[int]:
    """Cuts between units, such that parts have about as many behaviours each; ``length_T`` is unit by unit."""
    behaviors_U = np.append(0, length_T.cumsum())[unit_U]
    shares_P = np.arange(1, parts) * (behaviors_U[-1] / parts)
    return sorted({0, *np.searchsorted(behaviors_U, shares_P).tolist(), len(unit_U) - 1})


@lru_cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """A process has its own: a forked child lacks its parent's threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="top-k")
