"""Sums and maxima over the ranks of the default process group; without one, a process is alone."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


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
