"""What ranks send to each other: sums over ranks, columns of any types to all at once, and floats with gradients.

Without a process group a process is alone, and sums and maxima are its own values.

n = values, S = ranks, X = counts of a rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
from torchrec.distributed.types import Awaitable, QuantizedCommCodecs

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


def narrowest(largest: int) -> torch.dtype:
    """The narrowest of uint8, uint16, int32 and int64 that holds 0 .. ``largest``."""
    # torch moves uint16 but cannot add or index with it, so whoever receives a column widens it first.
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
    """An all-to-all of each column; `wait` returns them as they were received, one rank's values after the other's."""

    def __init__(self, group: dist.ProcessGroup, columns: Sequence[Column]) -> None:
        super().__init__()
        self._columns = columns
        self._incoming: list[Tensor] = []
        self._works: list[dist.Work] = []
        for column in columns:
            outgoing = column.values.contiguous()
            # Alone, a rank has what it sends.
            incoming = outgoing
            if group.size() > 1:
                incoming = outgoing.new_empty(sum(column.received), *outgoing.shape[1:])
                # Bytes, which every backend carries; gloo knows no 16-bit floats. All columns are on their way before
                # the first is waited for. In one collective they would have to be laid side by side for each rank,
                # which takes longer than their way as soon as ranks are many.
                into, out_of = (part.view(len(part), _width(part)).view(torch.uint8) for part in (incoming, outgoing))
                received, sent = list(column.received), list(column.sent)
                self._works.append(dist.all_to_all_single(into, out_of, received, sent, group=group, async_op=True))
            self._incoming.append(incoming)

    @record_function("dare/exchange")
    def _wait_impl(self) -> list[Tensor]:
        for work in self._works:
            work.wait()
        return self._incoming


def _width(values: Tensor) -> int:
    return int(values.shape[1:].numel())


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

    TorchRec's all-to-all of a `KeyedJaggedTensor` runs without gradient, so its weights cannot learn. Alone, a rank has
    what it sends, and nothing is encoded.

    Args:
        columns: of floating values.
        gradient_scale: multiplies the gradients that return.
        group: the ranks; each must call this, and must go through its backward pass.
        codecs: of the values and of their gradients on their way; None: as they are.

    Returns:
        Each column's values as they were received, one rank's after the other's.
    """
    if group.size() == 1:
        return tuple(column.values for column in columns)
    arrived: tuple[Tensor, ...] = _WithGradient.apply(
        group,
        [column.sent for column in columns],
        [column.received for column in columns],
        gradient_scale,
        codecs or codecs_of("fp32"),
        *(column.values for column in columns),
    )
    return arrived


@record_function("dare/exchange")
def exchange_counts(count_SX: Tensor, group: dist.ProcessGroup) -> tuple[list[list[int]], list[list[int]]]:
    """Tell each rank how much it will be sent; every rank must call it.

    Args:
        count_SX: integers, (S, X): row s is for rank s.
        group: the ranks.

    Returns:
        The counts for each rank, and those from each rank: X lists of S numbers.
    """
    # An all-to-all without sizes cuts the first dimension into equal parts: row s of the counts goes to rank s.
    received_SX = count_SX
    if group.size() > 1:
        received_SX = torch.empty_like(count_SX)
        dist.all_to_all_single(received_SX, count_SX.contiguous(), group=group)
    # Both at once: on a GPU the host waits here, because collectives need their sizes on the host.
    both: tuple[list[list[int]], list[list[int]]] = tuple(torch.stack([count_SX.T, received_SX.T]).tolist())
    return both
