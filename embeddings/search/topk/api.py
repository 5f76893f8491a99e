"""The K best-scored behaviours of each target's window, as an operator of torch: `torch.ops.dare.top_k`.

R = rows of the table, D = dim, M = behaviours of all users, T = targets, W = (target, behaviour) pairs, K = kept.
"""

from enum import StrEnum

import torch
from torch import Tensor

from embeddings.search.topk.inputs import PartKind, ScorePart, TopKInputs


class TopKImplementation(StrEnum):
    """Who computes the search; all agree, but for rounding."""

    REFERENCE = "reference"
    """Plain torch, on any device."""
    CPU = "cpu"
    """Compiled by Numba."""
    CUDA = "cuda"
    """Compiled by Triton."""


def top_k(inputs: TopKInputs, implementation: TopKImplementation | None = None) -> tuple[Tensor, Tensor]:
    """Score the behaviours of each target's window and keep the K best, without gradient.

    The result is deterministic: of equal scores the earlier behaviour wins. Padding never wins, not even over -inf.
    A score that is NaN beats all others, as in `torch.topk`, so that a broken row shows instead of being passed over.
    Products and sums are in float32. Targets whose windows overlap share the reading of rows.

    Args:
        inputs: rows, behaviours and targets; see `TopKInputs` for the score.
        implementation: by default the one for the rows' device.

    Returns:
        score_TK: float32, descending; -inf where the window has fewer than K behaviours.
        index_TK: int64, which of the M behaviours; -1 where the window has fewer than K.

    Raises:
        ValueError: k below 1, shapes, types or devices that do not fit, ids that are not rows of the table, windows
            outside of the behaviours, an implementation for another device.
    """
    if implementation is None:
        device = inputs.rows_RD.device.type
        implementation = TopKImplementation(device) if device in ("cpu", "cuda") else TopKImplementation.REFERENCE
    parts = inputs.parts
    # Detached, because the operator has no backward: its results must not seem to have a gradient.
    # torch's way to an operator in Python leads through its compiler, which takes a second or more to load.
    search = _top_k if torch.compiler.is_compiling() else _searched
    score_TK, index_TK = search(
        inputs.rows_RD.detach(),
        inputs.ids_M,
        inputs.start_T,
        inputs.end_T,
        inputs.query_TD.detach(),
        inputs.k,
        [int(part.kind) for part in parts],
        [part.rows_Rd.detach() for part in parts],
        [part.query_Qd.detach() for part in parts],
        [part.column_M for part in parts],
        [part.value_T for part in parts],
        [part.mask for part in parts],
        None if inputs.additive_W is None else inputs.additive_W.detach(),
        inputs.scale_R,
        inputs.longest,
        implementation,
    )
    return score_TK, index_TK


# An operator's schema has tensors and numbers alone, so here, and nowhere else, the inputs are spelled out.
def _searched(
    rows_RD: Tensor,
    ids_M: Tensor,
    start_T: Tensor,
    end_T: Tensor,
    query_TD: Tensor,
    k: int,
    kinds: list[int],
    part_rows: list[Tensor],
    part_queries: list[Tensor],
    part_columns: list[Tensor | None],
    part_values: list[Tensor | None],
    part_masks: list[int],
    additive_W: Tensor | None,
    scale_R: Tensor | None,
    longest: int | None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    # Checked before a kernel runs, because a kernel with a wrong index would read memory that is not the table's.
    of_parts = zip(map(PartKind, kinds), part_rows, part_queries, part_columns, part_values, part_masks, strict=True)
    parts = [ScorePart(*of_part) for of_part in of_parts]
    inputs = TopKInputs(rows_RD, ids_M, start_T, end_T, query_TD, k, parts, additive_W, scale_R, longest)
    inputs.check_kinds()
    if longest is None:
        longest = inputs.check_values()
    # Numba and Triton take a second or more to load: only those who need them pay for it.
    if implementation == TopKImplementation.CPU:
        if rows_RD.device.type != "cpu":
            raise ValueError(f"implementation: cpu, but the rows are on {rows_RD.device}")
        from embeddings.search.topk.cpu import top_k_cpu

        return top_k_cpu(inputs)
    if implementation == TopKImplementation.CUDA:
        from embeddings.search.topk.cuda import top_k_cuda

        return top_k_cuda(inputs, longest)
    from embeddings.search.topk.reference import top_k_reference

    return top_k_reference(inputs)


_top_k = torch.library.custom_op("dare::top_k", _searched, mutates_args=())


@_top_k.register_fake
def _(
    rows_RD: Tensor,
    ids_M: Tensor,
    start_T: Tensor,
    end_T: Tensor,
    query_TD: Tensor,
    k: int,
    *rest: object,
) -> tuple[Tensor, Tensor]:
    # Without this, `torch.compile` and `torch.export` would not know the shapes that the operator returns.
    TopKInputs(rows_RD, ids_M, start_T, end_T, query_TD, k).check_kinds()
    return (
        rows_RD.new_empty(len(start_T), k, dtype=torch.float32),
        rows_RD.new_empty(len(start_T), k, dtype=torch.int64),
    )
