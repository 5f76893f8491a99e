"""Products and weighted sums of rows that are named by an index, without a copy of any row; with gradient.

A behaviour that several targets have selected is one row; so is a category, or a position. Gathering the rows of T x K
behaviours first would write T x K x d floats, and once more as many in the backward pass.

T = targets, K = behaviours of each, L = rows, d = their dim.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding

from embeddings.compiled import in_even_parts

WORTH_THREADS = 1 << 22
"""Multiplications that are worth a second thread; with fewer it wakes up too late."""


def dot(query_Td: Tensor, rows_Ld: Tensor, index_TK: Tensor, in_order: bool = False) -> Tensor:
    """The products ``<query_Td[t], rows_Ld[index_TK[t, k]]>``, (T, K), with gradients of queries and rows.

    Args:
        query_Td: floats.
        rows_Ld: of the same type; at least one row if T x K is not 0.
        index_TK: int64, 0 .. L - 1.
        in_order: whether the index names each row once, in order.
    """
    if torch.compiler.is_exporting():
        # One loop, once it is compiled: no row is copied there either.
        return (embedding(index_TK, rows_Ld) * query_Td.unsqueeze(1)).sum(2)
    score_TK: Tensor = _Dot.apply(query_Td, rows_Ld, index_TK, in_order)
    return score_TK


def weighted_sum(weight_TK: Tensor, rows_Ld: Tensor, index_TK: Tensor, in_order: bool = False) -> Tensor:
    """The sums ``sum_k weight_TK[t, k] rows_Ld[index_TK[t, k]]``, (T, d), with gradients of weights and rows.

    Args:
        weight_TK: floats.
        rows_Ld: of the same type; at least one row if T x K is not 0.
        index_TK: int64, 0 .. L - 1.
        in_order: whether the index names each row once, in order.
    """
    if torch.compiler.is_exporting():
        return (embedding(index_TK, rows_Ld) * weight_TK.unsqueeze(2)).sum(1)
    sum_Td: Tensor = _WeightedSum.apply(weight_TK, rows_Ld, index_TK, in_order)
    return sum_Td


# The gradients of a product are a weighted sum and an outer product, those of a weighted sum are a product and an outer
# product: three functions serve both.
class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, query_Td: Tensor, rows_Ld: Tensor, index_TK: Tensor, in_order: bool) -> Tensor:
        context.save_for_backward(query_Td, rows_Ld, index_TK)
        context.in_order = in_order
        return _dot(query_Td, rows_Ld, index_TK)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient_TK: Tensor) -> tuple[Tensor | None, ...]:
        query_Td, rows_Ld, index_TK = context.saved_tensors
        of_query, of_rows, *_ = context.needs_input_grad
        return (
            _weighted_sum(gradient_TK, rows_Ld, index_TK) if of_query else None,
            _outer(gradient_TK, query_Td, index_TK, len(rows_Ld), context.in_order) if of_rows else None,
            None,
            None,
        )


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, weight_TK: Tensor, rows_Ld: Tensor, index_TK: Tensor, in_order: bool) -> Tensor:
        context.save_for_backward(weight_TK, rows_Ld, index_TK)
        context.in_order = in_order
        return _weighted_sum(weight_TK, rows_Ld, index_TK)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient_Td: Tensor) -> tuple[Tensor | None, ...]:
        weight_TK, rows_Ld, index_TK = context.saved_tensors
        of_weight, of_rows, *_ = context.needs_input_grad
        return (
            _dot(gradient_Td, rows_Ld, index_TK) if of_weight else None,
            _outer(weight_TK, gradient_Td, index_TK, len(rows_Ld), context.in_order) if of_rows else None,
            None,
            None,
        )


def _dot(query_Td: Tensor, rows_Ld: Tensor, index_TK: Tensor) -> Tensor:
    if query_Td.device.type != "cpu":
        return _gathered_dot(query_Td, rows_Ld, index_TK)
    from embeddings.layers import row_products_kernel

    score_TK = query_Td.new_empty(index_TK.shape)
    query, rows, index, score = _arrays(query_Td, rows_Ld, index_TK, score_TK)
    _in_parts(
        lambda first, end: row_products_kernel.dot(query, rows, index, first, end, score),
        len(index_TK),
        index_TK.numel() * rows_Ld.shape[1],
    )
    return score_TK


def _weighted_sum(weight_TK: Tensor, rows_Ld: Tensor, index_TK: Tensor) -> Tensor:
    if weight_TK.device.type != "cpu":
        return _gathered_sum(weight_TK, rows_Ld, index_TK)
    from embeddings.layers import row_products_kernel

    sum_Td = rows_Ld.new_empty(len(index_TK), rows_Ld.shape[1])
    weight, rows, index, sums = _arrays(weight_TK, rows_Ld, index_TK, sum_Td)
    _in_parts(
        lambda first, end: row_products_kernel.weighted_sum(weight, rows, index, first, end, sums),
        len(index_TK),
        index_TK.numel() * rows_Ld.shape[1],
    )
    return sum_Td


def _outer(weight_TK: Tensor, query_Td: Tensor, index_TK: Tensor, rows: int, in_order: bool) -> Tensor:
    """The sum over all t and k of ``weight_TK[t, k] * query_Td[t]`` in row ``index_TK[t, k]``, (rows, d)."""
    if weight_TK.device.type != "cpu":
        return _added_outer(weight_TK, query_Td, index_TK, rows, in_order)
    from embeddings.layers import row_products_kernel

    dim = query_Td.shape[1]
    rows_Ld = query_Td.new_empty(rows, dim) if in_order else query_Td.new_zeros(rows, dim)
    weight, query, index, written = _arrays(weight_TK, query_Td, index_TK, rows_Ld)
    _in_parts(
        lambda first, end: row_products_kernel.outer(weight, query, index, in_order, first, end, written),
        rows,
        index_TK.numel() * dim,
    )
    return rows_Ld


# What a GPU computes: the same three functions in plain torch, on copies of the rows.
def _gathered_dot(query_Td: Tensor, rows_Ld: Tensor, index_TK: Tensor) -> Tensor:
    return torch.bmm(embedding(index_TK, rows_Ld), query_Td.unsqueeze(2)).squeeze(2)


def _gathered_sum(weight_TK: Tensor, rows_Ld: Tensor, index_TK: Tensor) -> Tensor:
    return torch.bmm(weight_TK.unsqueeze(1), embedding(index_TK, rows_Ld)).squeeze(1)


def _added_outer(weight_TK: Tensor, query_Td: Tensor, index_TK: Tensor, rows: int, in_order: bool) -> Tensor:
    gradient_TKd = weight_TK.unsqueeze(2) * query_Td.unsqueeze(1)
    if in_order:
        return gradient_TKd.view(rows, query_Td.shape[1])
    # The backward pass of `embedding` adds up in a fixed order on a GPU too; `index_add` would not.
    added: Tensor = torch.ops.aten.embedding_dense_backward(gradient_TKd, index_TK, rows, -1, False)
    return added


def _arrays(*tensors: Tensor) -> list[Any]:
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


def _in_parts(kernel: Callable[[int, int], None], size: int, products: int) -> None:
    """Call a kernel for parts of 0 .. ``size``, which it cuts its work by, on as many threads as that is worth."""
    threads = torch.get_num_threads() if products >= WORTH_THREADS else 1
    in_even_parts(kernel, size, threads)
