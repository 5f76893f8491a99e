"""Products and weighted sums of rows by index, as a CPU and as a GPU compute them, against dense definitions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from embeddings.layers import row_products

# Targets, behaviours of each, rows, dim. Rows are fewer than what names them, so that the index repeats.
SHAPES = [(5, 4, 3, 6), (7, 3, 40, 5), (1, 1, 1, 1), (0, 4, 3, 6), (5, 0, 3, 6), (0, 0, 1, 2)]
MANY = (64, 50, 300, 24)
"""Multiplications enough for several threads."""


def drawn(
    shape: tuple[int, int, int, int], in_order: bool = False, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, weights, rows and an index of them; in order there is a row for each entry of the index."""
    targets, columns, rows, dim = shape
    draw = torch.Generator().manual_seed(sum(shape))
    if in_order:
        rows = targets * columns
        index_TK = torch.arange(rows).view(targets, columns)
    else:
        index_TK = torch.randint(0, rows, (targets, columns), generator=draw)
    query_Td, weight_TK, rows_Ld = (
        torch.randn(size, generator=draw, dtype=dtype) for size in ((targets, dim), (targets, columns), (rows, dim))
    )
    return query_Td, weight_TK, rows_Ld, index_TK


def dense_dot(query_Td: Tensor, rows_Ld: Tensor, index_TK: Tensor) -> Tensor:
    return (rows_Ld[index_TK] * query_Td[:, None]).sum(2)


def dense_sum(weight_TK: Tensor, rows_Ld: Tensor, index_TK: Tensor) -> Tensor:
    return (rows_Ld[index_TK] * weight_TK[:, :, None]).sum(1)


def results(function: Callable[..., Tensor], left: Tensor, rows_Ld: Tensor, *rest: object) -> list[Tensor]:
    """Value and both gradients, for an output gradient that differs from place to place."""
    left, rows_Ld = left.detach().requires_grad_(), rows_Ld.detach().requires_grad_()
    value = function(left, rows_Ld, *rest)
    factor = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view(value.shape)
    return [value.detach(), *torch.autograd.grad((value * factor).sum(), [left, rows_Ld])]


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, MANY])
def test_values_and_gradients_are_those_of_the_definition(shape: tuple[int, int, int, int], in_order: bool) -> None:
    query_Td, weight_TK, rows_Ld, index_TK = drawn(shape, in_order)
    for ours, dense, left in (
        (row_products.dot, dense_dot, query_Td),
        (row_products.weighted_sum, dense_sum, weight_TK),
    ):
        found = results(ours, left, rows_Ld, index_TK, in_order)
        torch.testing.assert_close(found, results(dense, left, rows_Ld, index_TK))


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_gradients_are_those_of_differences(shape: tuple[int, int, int, int], in_order: bool) -> None:
    query_Td, weight_TK, rows_Ld, index_TK = drawn(shape, in_order)
    for function, left in ((row_products.dot, query_Td), (row_products.weighted_sum, weight_TK)):
        inputs = (left.requires_grad_(), rows_Ld.requires_grad_(), index_TK, in_order)
        assert gradcheck(function, inputs)


@pytest.mark.parametrize("in_order", [False, True])
def test_a_gradient_that_nobody_wants_is_not_made(in_order: bool) -> None:
    query_Td, weight_TK, rows_Ld, index_TK = drawn(SHAPES[0], in_order)
    for function, left in ((row_products.dot, query_Td), (row_products.weighted_sum, weight_TK)):
        both = results(function, left, rows_Ld, index_TK, in_order)[1:]
        for number in range(2):
            inputs = [left.detach(), rows_Ld.detach()]
            inputs[number].requires_grad_()
            value = function(*inputs, index_TK, in_order)
            factor = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view(value.shape)
            (value * factor).sum().backward()
            torch.testing.assert_close(inputs[number].grad, both[number])
            assert inputs[1 - number].grad is None


def test_rows_may_lie_apart_in_memory() -> None:
    query_Td, weight_TK, rows_Ld, index_TK = drawn(SHAPES[0])
    wide = torch.cat([rows_Ld, rows_Ld], dim=1)
    apart, index = wide[:, : rows_Ld.shape[1]], index_TK.T.contiguous().T
    assert not apart.is_contiguous()
    assert not index.is_contiguous()
    torch.testing.assert_close(row_products.dot(query_Td, apart, index), dense_dot(query_Td, rows_Ld, index_TK))
    torch.testing.assert_close(row_products.weighted_sum(weight_TK, apart, index), dense_sum(weight_TK, rows_Ld, index))
    # One query for all targets, which `expand` repeats without copying.
    one = query_Td[:1].expand_as(query_Td)
    torch.testing.assert_close(row_products.dot(one, rows_Ld, index_TK), dense_dot(one, rows_Ld, index_TK))


@pytest.mark.parametrize("in_order", [False, True])
def test_threads_change_no_bit(in_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_products, "WORTH_THREADS", 1)
    query_Td, weight_TK, rows_Ld, index_TK = drawn(MANY, in_order, torch.float32)
    for function, left in ((row_products.dot, query_Td), (row_products.weighted_sum, weight_TK)):
        found = []
        for number in (1, 3):
            with threads(number):
                found.append(results(function, left, rows_Ld, index_TK, in_order))
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


# On a GPU the three functions below take the place of the compiled loops; how they make up values and gradients is the
# same on every device, and is tested above.
@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, MANY])
def test_what_a_gpu_computes_is_the_definition(shape: tuple[int, int, int, int], in_order: bool) -> None:
    query_Td, weight_TK, rows_Ld, index_TK = drawn(shape, in_order)
    score_TK = row_products._gathered_dot(query_Td, rows_Ld, index_TK)
    torch.testing.assert_close(score_TK, dense_dot(query_Td, rows_Ld, index_TK))
    sum_Td = row_products._gathered_sum(weight_TK, rows_Ld, index_TK)
    torch.testing.assert_close(sum_Td, dense_sum(weight_TK, rows_Ld, index_TK))
    expected_Ld = torch.zeros_like(rows_Ld)
    for target in range(len(index_TK)):
        for column, row in enumerate(index_TK[target].tolist()):
            expected_Ld[row] += weight_TK[target, column] * query_Td[target]
    outer_Ld = row_products._added_outer(weight_TK, query_Td, index_TK, len(rows_Ld), in_order)
    torch.testing.assert_close(outer_Ld, expected_Ld)
