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

from embeddings.compiled import in_threads

WORTH_THREADS = 1 << 16
"""Multiplications that are worth a second thread."""


def dot(query_Td: Tensor, rows_Ld: Tensor, index_TK: Tensor) -> Tensor:
    """The products ``<query_Td[t], rows_Ld[index_TK[t, k]]>``, (T, K), with gradients of queries and rows.

    Args:
        query_Td: floats.
        rows_Ld: of the same type; at least one row if T x K is not 0.
        index_TK: int64, 0 .. L - 1.
    """
    score_TK: Tensor = _Dot.apply(query_Td, rows_Ld, index_TK)
    return score_TK


def weighted_sum(weight_TK: Tensor, rows_Ld: Tensor, index_TK: Tensor) -> Tensor:
    """The sums ``sum_k weight_TK[t, k] rows_Ld[index_TK[t, k]]``, (T, d), with gradients of weights and rows.

    Args:
        weight_TK: floats.
        rows_Ld: of the same type; at least one row if T x K is not 0.
        index_TK: int64, 0 .. L - 1.
    """
    sum_Td: Tensor = _WeightedSum.apply(weight_TK, rows_Ld, index_TK)
    return sum_Td


# The gradients of a product are a weighted sum and an outer product, those of a weighted sum are a product and an outer
# product: three functions serve both.
class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, query_Td: Tensor, rows_Ld: Tensor, index_TK: Tensor) -> Tensor:
        context.save_for_backward(query_Td, rows_Ld, index_TK)
        return _dot(query_Td, rows_Ld, index_TK)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient_TK: Tensor) -> tuple[Tensor | None, ...]:
        query_Td, rows_Ld, index_TK = context.saved_tensors
        return (
            _weighted_sum(gradient_TK, rows_Ld, index_TK) if context.needs_input_grad[0] else None,
            _outer(gradient_TK, query_Td, index_TK, len(rows_Ld)) if context.needs_input_grad[1] else None,
            None,
        )


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, weight_TK: Tensor, rows_Ld: Tensor, index_TK: Tensor) -> Tensor:
        context.save_for_backward(weight_TK, rows_Ld, index_TK)
        return _weighted_sum(weight_TK, rows_Ld, index_TK)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient_Td: Tensor) -> tuple[Tensor | None, ...]:
        weight_TK, rows_Ld, index_TK = context.saved_tensors
        return (
            _dot(gradient_Td, rows_Ld, index_TK) if context.needs_input_grad[0] else None,
            _outer(weight_TK, gradient_Td, index_TK, len(rows_Ld)) if context.needs_input_grad[1] else None,
            None,
        )


def _dot(query_Td: Tensor, rows_Ld: Tensor, index_TK: Tensor) -> Tensor:
    if query_Td.device.type != "cpu":
        return torch.bmm(embedding(index_TK, rows_Ld), query_Td.unsqueeze(2)).squeeze(2)
    from embeddings.layers import row_products_kernel

    score_TK = query_Td.new_empty(index_TK.shape)
    _on_cpu(row_products_kernel.dot, query_Td, rows_Ld, index_TK, score_TK, len(index_TK))
    return score_TK


def _weighted_sum(weight_TK: Tensor, rows_Ld: Tensor, index_TK: Tensor) -> Tensor:
    if weight_TK.device.type != "cpu":
        return torch.bmm(weight_TK.unsqueeze(1), embedding(index_TK, rows_Ld)).squeeze(1)
    from embeddings.layers import row_products_kernel

    sum_Td = rows_Ld.new_empty(len(index_TK), rows_Ld.shape[1])
    _on_cpu(row_products_kernel.weighted_sum, weight_TK, rows_Ld, index_TK, sum_Td, len(index_TK))
    return sum_Td


def _outer(weight_TK: Tensor, query_Td: Tensor, index_TK: Tensor, rows: int) -> Tensor:
    """The sum over all t and k of ``weight_TK[t, k] * query_Td[t]`` in row ``index_TK[t, k]``, (rows, d)."""
    if weight_TK.device.type != "cpu":
        # The backward pass of `embedding` adds up in a fixed order on a GPU too; `index_add` would not.
        gradient_TKd = weight_TK.unsqueeze(2) * query_Td.unsqueeze(1)
        added: Tensor = torch.ops.aten.embedding_dense_backward(gradient_TKd, index_TK, rows, -1, False)
        return added
    from embeddings.layers import row_products_kernel

    rows_Ld = query_Td.new_zeros(rows, query_Td.shape[1])
    _on_cpu(row_products_kernel.add_outer, weight_TK, query_Td, index_TK, rows_Ld, rows)
    return rows_Ld


def _on_cpu(
    kernel: Callable[..., None], one: Tensor, other: Tensor, index_TK: Tensor, written: Tensor, size: int
) -> None:
    """Call a kernel for parts of 0 .. ``size``, which it cuts its work by."""
    arrays = [tensor.detach().contiguous().numpy() for tensor in (one, other, index_TK)]
    products = index_TK.numel() * other.shape[1]
    threads = torch.get_num_threads() if products >= WORTH_THREADS else 1
    cuts = [size * number // threads for number in range(threads + 1)]
    in_threads(lambda first, end: kernel(*arrays, first, end, written.numpy()), cuts, threads)
