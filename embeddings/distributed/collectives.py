"""What ranks send to each other: sums over ranks, columns of any types to all at once, and floats with gradients.

Without a process group a process is alone, and sums and maxima are its own values.

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
    """The largest of each value over all ranks of the default process group; every rank must call it."""
    if ranks() == 1:
        return values
    # All values in one all-reduce, and read back at once: on a GPU the host waits for it either way.
    largest = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return [int(value) for value in largest.tolist()]


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        # An all-reduce works in place, and the input of an autograd function must stay as it is.
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    # A collective inside backward has no gradient of its own; without this, a second differentiation would be wrong
    # silently.
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def sum_over_ranks(values: Tensor) -> Tensor:
    """Element-wise sum over all ranks of the default process group, any shape, with gradient.

    Every rank must call it, and must go through its backward pass.

    The sum on each rank depends on the values of all of them, so its gradient is summed over ranks too.
    """
    if ranks() == 1:
        return values
    total: Tensor = _SumOverRanks.apply(values)
    return total


WIRE_BYTES: dict[Communication, int] = {"fp32": 4, "fp16": 2, "bf16": 2}
"""Bytes of a float on its way between ranks."""


def codecs_of(communication: Communication) -> QuantizedCommCodecs:
    """TorchRec's codecs, which encode and decode floats (forward) and their gradients (backward).

    Gradients travel as bfloat16 in both 16-bit settings: those of a mean loss are too small for float16.
    """
    # TorchRec's registry of codecs replaces bf16 by fp16 on gloo. It is not used here, because floats travel as bytes,
    # which every backend carries. The codecs of fp32 return their argument.
    values = {"fp32": CommType.FP32, "fp16": CommType.FP16, "bf16": CommType.BF16}[communication]
    gradients = CommType.FP32 if communication == "fp32" else CommType.BF16
    return get_qcomm_codecs(QCommsConfig(forward_precision=values, backward_precision=gradients))


Arriving = TypeVar("Arriving")


def narrowest(largest: int) -> torch.dtype:
    """The narrowest of uint8, uint16, int32 and int64 that holds 0 .. ``largest``."""
    # Only types that hold 2^n - 1 as their largest value: `embeddings.search.messages` uses it as a bit mask. torch
    # moves uint16 but cannot add or index with it, so whoever receives a column widens it first.
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
        # All columns travel as bytes in one collective: each one of its own would wait for the slowest rank again.
        sizes = [column.values.element_size() * column.values.shape[1:].numel() for column in columns]
        # `outgoing[column][rank]` are the bytes of a column for a rank. Sizes are in bytes of one value, trailing dims
        # included.
        outgoing = [
            column.values.contiguous().flatten().view(torch.uint8).split([count * size for count in column.sent])
            for column, size in zip(columns, sizes, strict=True)
        ]
        # The bytes carry no header: their lengths follow from the counts, which both sides know, and from the types,
        # which must be the same on all ranks.
        self._received = [
            column.received[rank] * size for rank in ranks for column, size in zip(columns, sizes, strict=True)
        ]
        # In memory: all columns' parts for rank 0, then all columns' parts for rank 1, ...
        sent = [sum(len(parts[rank]) for parts in outgoing) for rank in ranks]
        received = [sum(self._received[rank * len(columns) : (rank + 1) * len(columns)]) for rank in ranks]
        self._outgoing = torch.cat([parts[rank] for rank in ranks for parts in outgoing])
        self._incoming = self._outgoing.new_empty(sum(received))
        self._work = dist.all_to_all_single(self._incoming, self._outgoing, received, sent, group=group, async_op=True)

    def _wait_impl(self) -> list[Tensor]:
        self._work.wait()
        parts = self._incoming.split(self._received)
        # Parts lie by rank, then by column: every n-th one, from the column's own, is of the same column.
        return [
            # `cat` also copies to fresh memory: a part may begin at any byte, and `view` wants an offset that the type
            # divides.
            torch.cat(parts[number :: len(self._columns)]).view(column.values.dtype).view(-1, *column.values.shape[1:])
            for number, column in enumerate(self._columns)
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
        # Tensors are not saved: the gradient of a copy needs no values, only where they came from.
        context.group, context.sent, context.received = group, sent, received
        context.scale, context.codec = scale, codecs.backward
        encoded = map(codecs.forward.encode, values)
        arrived = ColumnsAllToAll(group, list(map(Column, encoded, sent, received))).wait()
        return tuple(map(codecs.forward.decode, arrived))

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # The same exchange with the two sides swapped. Autograd hands over zeros for a column that the loss did not
        # use, so that a rank always has something to send to those that wait for it.
        encoded = map(context.codec.encode, gradients)
        back = ColumnsAllToAll(context.group, list(map(Column, encoded, context.received, context.sent))).wait()
        # The scale is applied where gradients arrive: the division by ranks for those of rows, its inverse for those of
        # pooling weights.
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
    arrived: tuple[Tensor, ...] = _WithGradient.apply(
        group,
        [column.sent for column in columns],
        [column.received for column in columns],
        gradient_scale,
        codecs or codecs_of("fp32"),
        *(column.values for column in columns),
    )
    return arrived


class CountsAllToAll(Awaitable[Arriving]):
    """How much each rank sends to each, on its way; `wait` starts the exchange that these counts are needed for."""

    def __init__(self, group: dist.ProcessGroup, counts: Tensor, send: Callable[[Tensor], Arriving]) -> None:
        super().__init__()
        # An all-to-all without sizes cuts the first dimension into equal parts: row s of the counts goes to rank s.
        self._sent, self._received, self._send = counts, torch.empty_like(counts), send
        self._work = dist.all_to_all_single(self._received, self._sent, group=group, async_op=True)

    def _wait_impl(self) -> Arriving:
        self._work.wait()
        # TorchRec's modules call `input_dist(...).wait().wait()`: the first wait is for counts, the second for the
        # values.
        return self._send(self._received)


class ReturnedParts(LazyAwaitable[Tensor]):
    """Parts that the shards have sent back, to be joined when they are waited for."""

    def __init__(self, parts: tuple[Tensor, ...], join: Callable[[tuple[Tensor, ...]], Tensor]) -> None:
        super().__init__()
        # The parts have arrived already, because an autograd function returns tensors and not promises; only joining
        # them can still wait. `ShardedModule.output_dist` has to return an awaitable.
        self._parts, self._join = parts, join

    def _wait_impl(self) -> Tensor:
        return self._join(self._parts)
