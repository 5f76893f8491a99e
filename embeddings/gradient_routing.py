"""The gradients that attention and representation send to tables that they share: kept separate, combined, measured.

DARE's argument begins with them: representation's gradients dominate and contradict attention's (figures 2 and 3).

L = rows looked up, U = distinct rows of them, X = rows looked up or all rows of a table, d = dim of a table,
S = ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from embeddings.distributed.collectives import Column, ColumnsAllToAll, exchange_counts, ranks, sum_over_ranks
from embeddings.features import Role, Rows
from embeddings.tables.batch_rows import BatchRows

Gradients = Mapping[str, list[Tensor]]
"""By table name: the gradients of the rows that were looked up in it, (L, d) each, or of all its rows."""

Ids = Mapping[str, list[Tensor]]
"""By table name: the ids of those rows, (L,) each. A table that is not here has gradients of all its rows, and each
rank has its part of their sum."""

Combine = Callable[[Gradients, Gradients, Ids], Gradients]
"""Makes the gradient that the tables get of attention's and representation's. Every rank calls it."""


def added(attention: Gradients, representation: Gradients, ids: Ids) -> Gradients:
    """The sum of both gradients, which is also what autograd computes if the two are not separated."""
    return {
        table: [one + other for one, other in zip(parts, representation[table], strict=True)]
        for table, parts in attention.items()
    }


def normalized(attention: Gradients, representation: Gradients, ids: Ids) -> Gradients:
    """Attention's gradient scaled to the norm of representation's, table by table, and then the sum (DARE, appendix C).

    The norms are of the gradients of whole tables over the global batch: what comes to a row from several places is
    added up first. Where attention has none, nothing is scaled.
    """
    # In float64: squares of small gradients, of all rows of a table, are added up, and float32 would lose the small
    # ones.
    squares = []
    for table in attention:
        both_X2d = torch.stack([torch.cat(side[table]) for side in (attention, representation)], dim=1).double()
        # Rows by id: the same row may have been looked up several times, here and on other ranks, and its gradient is
        # the sum.
        if table in ids:
            squares.append(_added_by_id(torch.cat(ids[table]), both_X2d).square().sum((0, 2)))
        else:
            # All rows of a small table: each rank has its part of every row's gradient. After the sum all ranks have
            # the same norm, which the next line adds up over ranks, so each contributes its share of it.
            squares.append(sum_over_ranks(both_X2d).square().sum((0, 2)) / ranks())
    of_attention, of_representation = sum_over_ranks(torch.stack(squares)).sqrt().unbind(1)
    # No branch on the value: on a GPU the host would have to wait for it.
    scale = torch.where(of_attention > 0, of_representation / of_attention, 1).float()
    scaled = {}
    for (table, parts), factor in zip(attention.items(), scale, strict=True):
        scaled[table] = [part * factor for part in parts]
    return added(scaled, representation, ids)


def _added_by_id(id_L: Tensor, gradient_L2d: Tensor) -> Tensor:
    """The gradients of rows, added up over all ranks: (U, 2, d) for the rows whose sum is this rank's to make."""
    id_U, gradient_U2d = _sums(id_L, gradient_L2d)
    if ranks() == 1:
        return gradient_U2d
    # Any rule that all ranks share will do: each row is added up on one rank, and only its norm is wanted.
    owner_U = id_U.long() % ranks()
    order_U = owner_U.argsort(stable=True)
    count_S = torch.bincount(owner_U, minlength=ranks())
    group = dist.group.WORLD
    assert group is not None

    (sent,), (received,) = exchange_counts(count_S[:, None], group)
    columns = [Column(values[order_U], sent, received) for values in (id_U, gradient_U2d)]
    return _sums(*ColumnsAllToAll(group, columns).wait())[1]


def _sums(id_L: Tensor, gradient_L2d: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids, (U,), and the sum of each one's gradients, (U, 2, d)."""
    # The sum over a row's uses comes before the norm: the norm of a sum is not that of its parts.
    id_U, slot_L = id_L.unique(return_inverse=True)
    return id_U, gradient_L2d.new_zeros(len(id_U), *gradient_L2d.shape[1:]).index_add(0, slot_L, gradient_L2d)


class _SplitGradients(torch.autograd.Function):
    """The identity, twice; backward hands the gradients of both copies to ``combine``."""

    @staticmethod
    def forward(context: Any, combine: Combine, tables: list[str], ids: Ids, *rows: Tensor) -> tuple[Tensor, ...]:
        context.combine, context.tables, context.ids = combine, tables, ids
        # Two views of every part: no row is copied, and each view has a gradient of its own.
        return tuple(part.view_as(part) for part in (*rows, *rows))

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # The first half came back from attention, the second from representation. By table, since a table may have been
        # read for targets and for several sequences.
        count = len(context.tables)
        sides: list[dict[str, list[Tensor]]] = []
        for side in (gradients[:count], gradients[count:]):
            by_table: dict[str, list[Tensor]] = {}
            for table, part in zip(context.tables, side, strict=True):
                by_table.setdefault(table, []).append(part)
            sides.append(by_table)
        # Back to the flat order in which `forward` was given the parts.
        combined = {table: iter(parts) for table, parts in context.combine(*sides, context.ids).items()}
        return (None, None, None, *(next(combined[table]) for table in context.tables))


def split_gradients(rows: BatchRows, combine: Combine) -> tuple[BatchRows, BatchRows]:
    """Two readings of one lookup, for attention and for representation, whose gradients meet in ``combine``.

    Args:
        rows: the lookup.
        combine: makes one gradient of the two; see `Combine`.

    Returns:
        The rows for attention, and the rows for representation.
    """
    parts, ids = rows.parts(), dict[str, list[Tensor]]()
    for part in parts:
        if part.id_L is not None:
            ids.setdefault(part.table, []).append(part.id_L)
    copies = _SplitGradients.apply(combine, [part.table for part in parts], ids, *(part.rows for part in parts))
    return rows.replaced(copies[: len(parts)]), rows.replaced(copies[len(parts) :])


class GradientNorms:
    """A `RowHook` that measures the gradients of attention and of representation separately, even in shared tables.

    Example:
        norms = GradientNorms()
        click_loss(model(batch, row_hook=norms), batch.label_T).backward()
        norms.norms()  # {"attention": ..., "representation": ...}
    """

    def __init__(self) -> None:
        self._squares: dict[Role, Tensor] = {}

    def __call__(
        self,
        role: Role,
        rows: Sequence[Rows],
        function: Callable[[Sequence[Rows]], Tensor],
        output: Tensor,
        weights: Sequence[Tensor | None],
    ) -> None:
        """Count the gradient that comes back to ``rows`` through ``output`` as that of ``role``; see `RowHook`.

        The step's own graph is left alone: views or copies in it, to separate the roles, would change the order in
        which autograd adds up the gradients of a shared row, and with it the last bits of a run. Instead the gradient
        of ``output`` is taken through ``function`` once more, from detached rows.
        """
        if output.requires_grad:
            output.register_hook(partial(self._count, role, rows, function, weights))

    def _count(
        self,
        role: Role,
        rows: Sequence[Rows],
        function: Callable[[Sequence[Rows]], Tensor],
        weights: Sequence[Tensor | None],
        gradient: Tensor,
    ) -> None:
        # A hook runs within the backward pass, where gradients are off. Detached rows end the small graph that is made
        # here.
        with torch.enable_grad():
            leaves = [part.map(lambda tensor: tensor.detach().requires_grad_()) for part in rows]
            tensors = [
                (tensor, weight) for part, weight in zip(leaves, weights, strict=True) for tensor in part.parts()
            ]
            gradients = torch.autograd.grad(
                function(leaves), [tensor for tensor, _ in tensors], gradient, allow_unused=True
            )
        for row_gradient, (_, weight_TK) in zip(gradients, tensors, strict=True):
            if row_gradient is None:
                continue
            # One square for each target: of its own row, or of all K rows of its behaviours.
            square = torch.linalg.vector_norm(row_gradient.flatten(1), dim=1, dtype=torch.float64).square()
            if weight_TK is not None:
                # The gradient of ``e_k`` is ``w_tk g_t``, so the squares of all K are ``sum_k w_tk^2`` times that of
                # ``g_t``.
                square = square * weight_TK.detach().double().square().sum(1)
            self._squares[role] = self._squares.get(role, torch.zeros_like(square[:0].sum())) + square.sum()

    def norms(self) -> dict[Role, float]:
        """Norms of the gradients of all rows that the global batch looked up, by role; every rank must call it.

        0 for a role whose rows have no gradient.
        """
        nothing = torch.zeros_like(next(iter(self._squares.values())))  # a model need not learn its attention
        totals = sum_over_ranks(
            torch.stack([self._squares.get("attention", nothing), self._squares.get("representation", nothing)])
        )
        # A rank's loss is that of the global batch times the number of ranks.
        attention, representation = (totals.sqrt() / ranks()).tolist()
        return {"attention": attention, "representation": representation}
