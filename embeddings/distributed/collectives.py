"""Sums and maxima over the ranks of the default process group; without one, a process is alone.

Floats as they travel between ranks: as they are, or in 16 bits (TorchRec's codecs).

Columns of any types that travel to the other ranks together, and floats whose gradients come back.

n = values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
from torchrec.distributed.types import Awaitable, LazyAwaitable, QuantizedCommCodecs

from schemas.model import Communication


def ranks() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def max_over_ranks(values: list[int], device: torch.device) -> list[int]:
    """The largest of each value over all ranks; every rank must call it."""
    if ranks() == 1:
        return values
    largest = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return [int(value) for value in largest.tolist()]


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def sum_over_ranks(values: Tensor) -> Tensor:
    """Element-wise sum over all ranks, any shape; every rank must call it, and must go through its backward.

    The sum on each rank depends on the values of all of them, so its gradient is summed over ranks too.
    """
    if ranks() == 1:
        return values
    total: Tensor = _SumOverRanks.apply(values)
    return total


WIRE_BYTES: dict[Communication, int] = {"fp32": 4, "fp16": 2, "bf16": 2}
"""Of a float on its way."""


def codecs_of(communication: Communication) -> QuantizedCommCodecs:
    """What encodes and decodes floats (forward) and their gradients (backward).

    Gradients travel as bfloat16 in both 16-bit settings: those of a mean loss are too small for float16.
    """
    values = {"fp32": CommType.FP32, "fp16": CommType.FP16, "bf16": CommType.BF16}[communication]
    gradients = CommType.FP32 if communication == "fp32" else CommType.BF16
    return get_qcomm_codecs(QCommsConfig(forward_precision=values, backward_precision=gradients))


Arriving = TypeVar("Arriving")


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
        context: Any,
        group: dist.ProcessGroup,
        sent: Sequence[Sequence[int]],
        received: Sequence[Sequence[int]],
        scale: float,
        codecs: QuantizedCommCodecs,
        *values: Tensor,
    ) -> tuple[Tensor, ...]:
        context.group, context.sent, context.received = group, sent, received
        context.scale, context.codec = scale, codecs.backward
        encoded = map(codecs.forward.encode, values)
        found = ColumnsAllToAll(group, list(map(Column, encoded, sent, received))).wait()
        return tuple(map(codecs.forward.decode, found))

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        encoded = map(context.codec.encode, gradients)
        back = ColumnsAllToAll(context.group, list(map(Column, encoded, context.received, context.sent))).wait()
        return None, None, None, None, None, *(context.codec.decode(gradient) * context.scale for gradient in back)


def all_to_all_with_gradient(
    columns: Sequence[Column],
    gradient_scale: float,
    group: dist.ProcessGroup,
    codecs: QuantizedCommCodecs | None = None,
) -> tuple[Tensor, ...]:
    """Send floats to their ranks, all columns at once; in the backward pass their gradients return.

    TorchRec's all-to-all of a `KeyedJaggedTensor` runs without gradient, so its weights cannot learn.

    Args:
        columns: of floating values.
        gradient_scale: multiplies the gradients that return.
        group: the ranks; each must call this, and must go through its backward pass.
        codecs: of the values and of their gradients on their way; None: as they are.

    Returns:
        Each column's values as they were received, one rank's after the other's.
    """
    found: tuple[Tensor, ...] = _WithGradient.apply(
        group,
        [column.sent for column in columns],
        [column.received for column in columns],
        gradient_scale,
        codecs or codecs_of("fp32"),
        *(column.values for column in columns),
    )
    return found


class CountsAllToAll(Awaitable[Arriving]):
    """How much each rank sends to each, on its way; `wait` starts what these counts are needed for."""

    def __init__(self, group: dist.ProcessGroup, counts: Tensor, send: Callable[[Tensor], Arriving]) -> None:
        super().__init__()
        self._sent, self._received, self._send = counts, torch.empty_like(counts), send
        self._work = dist.all_to_all_single(self._received, self._sent, group=group, async_op=True)

    def _wait_impl(self) -> Arriving:
        self._work.wait()
        return self._send(self._received)


class ReturnedParts(LazyAwaitable[Tensor]):
    """What the shards have sent home, to be put together when it is asked for."""

    def __init__(self, parts: tuple[Tensor, ...], put: Callable[[tuple[Tensor, ...]], Tensor]) -> None:
        super().__init__()
        self._parts, self._put = parts, put

    def _wait_impl(self) -> Tensor:
        return self._put(self._parts)
