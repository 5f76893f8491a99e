"""The collectives that metrics need, over the ranks of a process group or over one process alone.

N = values of this rank, W = ranks.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The ranks of a group; every rank must call the same methods in the same order.

    Args:
        group: gloo or NCCL. None: the default group, or, where there is none, this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if group is None and dist.is_initialized():
            group = dist.group.WORLD
        self._group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        on_gpu = group is not None and dist.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        """Where tensors must be for the group's collectives."""

    def gather(self, values_N: Tensor) -> list[Tensor]:
        """Return the values of each rank, in the ranks' order; their numbers may differ.

        Args:
            values_N: (N,), of one dtype on all ranks, on any device.

        Returns:
            W tensors on ``device``.
        """
        values_N = values_N.to(self.device)
        if self.size == 1:
            return [values_N]
        length_W = [int(length) for length in self._gather_equal(torch.tensor([len(values_N)], device=self.device))]
        # A gather needs tensors of one length: the longest one's, cut again afterwards.
        padded = values_N.new_zeros(max(length_W))
        padded[: len(values_N)] = values_N
        return [values[:length] for values, length in zip(self._gather_equal(padded), length_W, strict=True)]

    def gather_numbers(self, *numbers: int | float) -> list[Sequence[int | float]]:
        """Return the numbers of each rank, in the ranks' order: all int (64 bits) or all float."""
        dtype = torch.float64 if isinstance(numbers[0], float) else torch.int64
        return [values.tolist() for values in self.gather(torch.tensor(numbers, dtype=dtype))]

    def exchange(self, values_N: Tensor, count_W: Sequence[int]) -> Tensor:
        """Send each rank its part of the values.

        Args:
            values_N: (N,) on ``device``, ordered by the rank that gets them.
            count_W: number of values for each rank; their sum is N.

        Returns:
            The values that this rank was sent, in the order of the senders.
        """
        if self.size == 1:
            return values_N
        sent_W = torch.tensor(count_W, dtype=torch.int64, device=self.device)
        # First how much comes from whom, then the values themselves: the receiver must know the sizes.
        received_W = torch.empty_like(sent_W)
        dist.all_to_all_single(received_W, sent_W, group=self._group)
        received: list[int] = received_W.tolist()
        result = values_N.new_empty(sum(received))
        dist.all_to_all_single(result, values_N.contiguous(), received, list(count_W), group=self._group)
        return result

    def _gather_equal(self, values: Tensor) -> list[Tensor]:
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(gathered, values, group=self._group)
        return gathered
