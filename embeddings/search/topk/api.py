"""The K best-scored behaviours of each target's window, as an operator of torch: `torch.ops.dare.top_k`.

R = rows of the table, D = dim, M = ids of all users, T = targets, W = sum of window lengths, K = kept.
"""

from enum import StrEnum

import torch
from torch import Tensor

from embeddings.search.topk.arguments import check_kinds, check_values
from embeddings.search.topk.reference import top_k_reference


class TopKImplementation(StrEnum):
    """Who computes it; all agree, but for rounding."""

    REFERENCE = "reference"
    """Plain torch, on any device."""
    CPU = "cpu"
    """Compiled by Numba."""
    CUDA = "cuda"
    """Compiled by Triton."""


def top_k(
    rows_RD: Tensor,
    ids_M: Tensor,
    start_T: Tensor,
    end_T: Tensor,
    query_TD: Tensor,
    additive_W: Tensor,
    k: int,
    *,
    scale_R: Tensor | None = None,
    implementation: TopKImplementation | None = None,
) -> tuple[Tensor, Tensor]:
    """Score ``<rows_RD[ids_M[m]], query_TD[t]> + additive`` for each m of target t's window, keep the k best.

    No gradient. Deterministic: of equal scores the earlier behaviour wins. Padding never wins, not even over -inf.
    A score that is NaN beats all others, as in `torch.topk`, so that a broken row shows instead of being passed over.
    Products and sums are in float32. Targets whose windows overlap share the reading of rows.

    Args:
        rows_RD: float32, float16, bfloat16 or int8, the attention table's rows.
        ids_M: int32 or int64, the row of each behaviour; windows count in it.
        start_T: int64, start of each target's window.
        end_T: int64, its end; windows may be empty, and may overlap.
        query_TD: floating, the targets' rows, already divided by the root of the dim.
        additive_W: float32, a score for each (target, behaviour) pair, windows one after the other.
        k: K, at least 1.
        scale_R: float32, what int8 rows are multiplied by; for them alone.
        implementation: by default the one for the rows' device.

    Returns:
        score_TK: float32, descending; -inf where the window has fewer than K.
        index_TK: int64, counted in M; -1 there.

    Raises:
        ValueError: k below 1, shapes, types or devices that do not fit, ids that are not rows of the table, windows
            outside of the ids, an implementation for another device.
    """
    if implementation is None:
        on = rows_RD.device.type
        implementation = TopKImplementation(on) if on in ("cpu", "cuda") else TopKImplementation.REFERENCE
    score_TK, index_TK = _top_k(
        rows_RD.detach(), ids_M, start_T, end_T, query_TD.detach(), additive_W.detach(), k, scale_R, implementation
    )
    return score_TK, index_TK


@torch.library.custom_op("dare::top_k", mutates_args=())
def _top_k(
    rows_RD: Tensor,
    ids_M: Tensor,
    start_T: Tensor,
    end_T: Tensor,
    query_TD: Tensor,
    additive_W: Tensor,
    k: int,
    scale_R: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    check_kinds(rows_RD, ids_M, start_T, end_T, query_TD, additive_W, k, scale_R)
    longest = check_values(rows_RD, ids_M, start_T, end_T, additive_W)
    arguments = (rows_RD, ids_M, start_T, end_T, query_TD, additive_W, k, scale_R)
    # Compilers are loaded only by those who need them.
    if implementation == TopKImplementation.CPU:
        if rows_RD.device.type != "cpu":
            raise ValueError(f"implementation: cpu, but the rows are on {rows_RD.device}")
        from embeddings.search.topk.cpu import top_k_cpu

        return top_k_cpu(*arguments)
    if implementation == TopKImplementation.CUDA:
        from embeddings.search.topk.cuda import top_k_cuda

        return top_k_cuda(*arguments, longest)
    return top_k_reference(*arguments)


@_top_k.register_fake
def _(
    rows_RD: Tensor,
    ids_M: Tensor,
    start_T: Tensor,
    end_T: Tensor,
    query_TD: Tensor,
    additive_W: Tensor,
    k: int,
    scale_R: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    check_kinds(rows_RD, ids_M, start_T, end_T, query_TD, additive_W, k, scale_R)
    return (
        rows_RD.new_empty(len(start_T), k, dtype=torch.float32),
        rows_RD.new_empty(len(start_T), k, dtype=torch.int64),
    )
