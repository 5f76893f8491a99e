"""Columns of any types that travel to the other ranks together, and floats whose gradients come back.

n = values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchrec.distributed.types import Awaitable


def narrowest(largest: int) -> torch.dtype:
    """The narrowest integer type that holds 0 .. ``largest``."""
    for dtype in (torch.uint8, torch.uint16, torch.int32):
        if largest <= torch.iinfo(dtype).max:
            return dtype
    return torch.int64


@dataclass(frozen=True)
class Column:
    """Values for each rank, one rank's after the other's."""

    values: Tensor
    """(n,) of any type, or (n, ...)."""
    sent: Sequence[int]
    """How many of them go to each rank."""
    received: Sequence[int]
    """How many come from each."""


class ColumnsAllToAll(Awaitable[list[Tensor]]):
    """One all-to-all of all columns; `wait` returns them as they were received, one rank's values after the other's."""

    def __init__(self, group: dist.ProcessGroup, columns: Sequence[Column]) -> None:
        super().__init__()
        self._columns = columns
        ranks = range(group.size())
        sizes = [column.values.element_size() * column.values.shape[1:].numel() for column in columns]
        outgoing = [
            column.values.contiguous().flatten().view(torch.uint8).split([count * size for count in column.sent])
            for column, size in zip(columns, sizes, strict=True)
        ]
        self._received = [
            column.received[rank] * size for rank in ranks for column, size in zip(columns, sizes, strict=True)
        ]
        sent = [sum(len(parts[rank]) for parts in outgoing) for rank in ranks]
        received = [sum(self._received[rank * len(columns) : (rank + 1) * len(columns)]) for rank in ranks]
        self._outgoing = torch.cat([parts[rank] for rank in ranks for parts in outgoing])
        self._incoming = self._outgoing.new_empty(sum(received))
        self._work = dist.all_to_all_single(self._incoming, self._outgoing, received, sent, group=group, async_op=True)

    def _wait_impl(self) -> list[Tensor]:
        self._work.wait()
        parts = self._incoming.split(self._received)
        return [
            torch.cat(parts[place :: len(self._columns)]).view(column.values.dtype).view(-1, *column.values.shape[1:])
            for place, column in enumerate(self._columns)
        ]


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, values: Tensor, sent: list[int], received: list[int], scale: float, group: dist.ProcessGroup
    ) -> Tensor:
        context.sent, context.received, context.scale, context.group = sent, received, scale, group
        found = values.new_empty(sum(received), *values.shape[1:])
        dist.all_to_all_single(found, values.contiguous(), received, sent, group=group)
        return found

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = gradient.new_empty(sum(context.sent), *gradient.shape[1:])
        dist.all_to_all_single(found, gradient.contiguous(), context.sent, context.received, group=context.group)
        return found * context.scale, None, None, None, None


def all_to_all_with_gradient(
    values: Tensor, sent: list[int], received: list[int], gradient_scale: float, group: dist.ProcessGroup
) -> Tensor:
    """Send values to their ranks; in the backward pass their gradients return.

    TorchRec's all-to-all of a `KeyedJaggedTensor` runs without gradient, so its weights cannot learn.

    Args:
        values: floating (n, ...), one rank's after the other's.
        sent: how many go to each rank.
        received: how many come from each.
        gradient_scale: multiplies the gradients that return.
        group: the ranks; each must call this, and must go through its backward pass.
    """
    found: Tensor = _WithGradient.apply(values, sent, received, gradient_scale, group)
    return found
