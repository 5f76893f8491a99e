"""One lookup whose rows are used for attention and for representation, with a say in how their gradients meet.

L = rows looked up, d = dim of a table.
"""

from collections.abc import Callable, Mapping, Set
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from embeddings.collective import sum_over_ranks
from embeddings.lookup import BatchRows

Gradients = Mapping[str, list[Tensor]]
"""By table: the gradients of the rows that were looked up in it, (L, d) each, or of all its rows."""

Combine = Callable[[Gradients, Gradients, Set[str]], Gradients]
"""The gradient that the tables get, of those of attention and of representation. The names are of those tables whose
gradients are of all their rows; each rank has its part of their sum. Every rank calls it."""


def added(attention: Gradients, representation: Gradients, whole: Set[str]) -> Gradients:
    """The sum, as if nothing had been told apart."""
    return {
        table: [one + other for one, other in zip(parts, representation[table], strict=True)]
        for table, parts in attention.items()
    }


def normalized(attention: Gradients, representation: Gradients, whole: Set[str]) -> Gradients:
    """Attention's scaled to the norm of representation's, by table, then the sum (DARE, appendix C).

    The norms are of the looked-up rows' gradients, over the global batch; where attention has none, nothing is scaled.
    """
    by_table = [(table, parts) for side in (attention, representation) for table, parts in side.items()]
    squares = sum_over_ranks(torch.stack([_square(parts) for _, parts in by_table]))
    for place, (table, parts) in enumerate(by_table):
        if table in whole:
            squares[place] = _square([sum_over_ranks(part) for part in parts])
    of_attention, of_representation = squares.sqrt().chunk(2)
    scale = torch.where(of_attention > 0, of_representation / of_attention, 1).float()
    scaled = {table: [part * scale[place] for part in parts] for place, (table, parts) in enumerate(attention.items())}
    return added(scaled, representation, whole)


def _square(parts: list[Tensor]) -> Tensor:
    return torch.stack([part.double().square().sum() for part in parts]).sum()


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, combine: Combine, tables: list[str], whole: Set[str], *parts: Tensor
    ) -> tuple[Tensor, ...]:
        context.combine, context.tables, context.whole = combine, tables, whole
        return tuple(part.view_as(part) for part in (*parts, *parts))

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        count = len(context.tables)
        sides: list[dict[str, list[Tensor]]] = []
        for side in (gradients[:count], gradients[count:]):
            by_table: dict[str, list[Tensor]] = {}
            for table, part in zip(context.tables, side, strict=True):
                by_table.setdefault(table, []).append(part)
            sides.append(by_table)
        combined = {table: iter(parts) for table, parts in context.combine(*sides, context.whole).items()}
        return (None, None, None, *(next(combined[table]) for table in context.tables))


def tables_apart(rows: BatchRows, combine: Combine) -> tuple[BatchRows, BatchRows]:
    """Two readings of the same rows: for attention and for representation.

    Args:
        rows: looked up once.
        combine: how the gradients of both meet.
    """
    looked_up, whole = rows.parts()
    parts = [*looked_up, *whole]
    found = _Apart.apply(combine, [table for table, _ in parts], {table for table, _ in whole}, *(p for _, p in parts))
    return rows.replaced(found[: len(parts)]), rows.replaced(found[len(parts) :])
