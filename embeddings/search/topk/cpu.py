"""Top-K search on the CPU: the work is cut into units for threads; nothing of size (N, D) or (T, N) is written.

T = targets, K = kept, N = longest window, D = dim, U = units of work: targets whose windows overlap, up to a limit, so
that they share what the caches hold, P = cuts between parts of the work.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embeddings.compiled import in_threads
from embeddings.search.topk import cpu_kernel
from embeddings.search.topk.cpu_arguments import PART, SearchWindows, TableRows, Units
from embeddings.search.topk.cpu_request import is_request, top_k_of_request
from embeddings.search.topk.inputs import TopKInputs

TARGETS_TOGETHER = 64
"""Most targets of a unit; more would leave threads without work."""
PARTS_PER_THREAD = 4
"""Several, so that a thread that the system interrupts does not keep all others waiting."""
WORTH_THREADS = 1 << 16
"""Multiplications that are worth a second thread; fewer are done before it has woken up."""

_AS_INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.uint16}


def top_k_cpu(inputs: TopKInputs) -> tuple[Tensor, Tensor]:
    """The search of `embeddings.search.topk.api.top_k`, with as many threads as torch uses; inputs are checked."""
    if is_request(inputs):
        return top_k_of_request(inputs)
    rows_RD, scale_R, targets = inputs.rows_RD, inputs.scale_R, len(inputs.start_T)
    # Nothing is cleared: the kernel writes all K columns, filling included.
    score_TK = torch.empty(targets, inputs.k, dtype=torch.float32)
    index_TK = torch.empty(targets, inputs.k, dtype=torch.int64)
    # A slice of a table's columns is searched as it lies, by the distance between its rows; only the values of a row
    # must be neighbours.
    rows_RD = rows_RD if rows_RD.stride(1) == 1 else rows_RD.contiguous()
    # Views, not copies: numpy shares the memory of the tensors. Half precision goes in as integers.
    table = TableRows(
        rows_RD.view(_AS_INTEGERS.get(rows_RD.dtype, rows_RD.dtype)).numpy(),
        rows_RD.stride(0) * rows_RD.itemsize,
        np.empty(0, np.float32) if scale_R is None else scale_R.contiguous().numpy(),
    )
    parts_P, held = _parts(inputs)
    windows = SearchWindows(
        inputs.ids_M.contiguous().numpy(),
        inputs.start_T.numpy(),
        inputs.end_T.numpy(),
        inputs.query_TD.float().contiguous().numpy(),
        inputs.first_pair_T.numpy(),
        np.empty(0, np.float32) if inputs.additive_W is None else inputs.additive_W.contiguous().numpy(),
        parts_P,
    )
    products = int(inputs.length_T.numpy().sum()) * int(rows_RD.shape[1] + parts_P["dim"].sum())
    threads = torch.get_num_threads() if products >= WORTH_THREADS else 1
    units = _units(windows, min(TARGETS_TOGETHER, -(-targets // threads)))

    def search(first_unit: int, end_unit: int) -> None:
        # Keys hold the bits of scores, so the kernel writes bits, into the memory of the floats.
        bits_TK = score_TK.view(torch.int32).numpy()
        cpu_kernel.search(table, windows, units, first_unit, end_unit, bits_TK, index_TK.numpy())

    # More parts than threads, of about equal work each, though users' histories differ in length by orders of
    # magnitude.
    parts = threads * PARTS_PER_THREAD if threads > 1 else 1
    in_threads(search, _cuts(units, inputs.length_T.numpy(), parts), threads)
    # Until here the kernel has read them by their addresses.
    del held
    return score_TK, index_TK


def _parts(inputs: TopKInputs) -> tuple[NDArray[Any], list[Tensor]]:
    """The parts of the score as the kernel takes them, and the tensors that their addresses are of."""
    parts_P, held = np.zeros(len(inputs.parts), PART), list[Tensor]()

    def address(tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        held.append(tensor.contiguous())
        return held[-1].data_ptr()

    for number, part in enumerate(inputs.parts):
        score_R, dim = part.score_R, part.rows_Rd.shape[1]
        parts_P[number] = (
            part.kind,
            len(part.rows_Rd),
            part.mask,
            address(part.column_M),
            address(part.value_T),
            address(score_R),
            address(part.rows_Rd),
            address(part.query_Qd),
            1 if score_R is not None else dim,
        )
    return parts_P, held


def _units(windows: SearchWindows, most: int) -> Units:
    """Targets whose windows overlap, in units of at most ``most``."""
    # Targets of a user lie next to each other in this order, for a user's windows are in one stretch of the behaviours.
    order_T = np.argsort(windows.start_T, kind="stable")
    start_T, end_T = windows.start_T[order_T], windows.end_T[order_T]
    rank_T = np.arange(len(order_T))
    # In order of their starts, a target begins a group if no window before it reaches as far.
    begins_T = np.ones(len(order_T), bool)
    begins_T[1:] = start_T[1:] >= np.maximum.accumulate(end_T)[:-1]
    # The place of each target in its group; every ``most``-th one begins a unit.
    in_group_T = rank_T - np.maximum.accumulate(np.where(begins_T, rank_T, 0))
    return Units(order_T, np.append(rank_T[in_group_T % max(most, 1) == 0], len(order_T)))


def _cuts(units: Units, length_T: NDArray[np.int64], parts: int) -> list[int]:
    """Cuts between units, such that about as many behaviours lie between each two of them."""
    # Where each unit begins, in pairs. A cut goes to the first unit behind an equal share.
    pairs_U = np.append(0, length_T[units.order_T].cumsum())[units.offset_U]
    shares_P = np.arange(1, parts) * (pairs_U[-1] / parts)
    return sorted({0, *np.searchsorted(pairs_U, shares_P).tolist(), len(units.offset_U) - 1})
