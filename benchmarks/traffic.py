"""Bytes that a rank sends to others, counted collective by collective."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Counts while it is active, as the best algorithms of each collective would send.

    Example:
        with Traffic() as traffic:
            model(batch)
        traffic.bytes
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), keywords: Mapping[str, Any] | None = None
    ) -> Any:
        name = function.name()
        if name.startswith("c10d::"):
            self.bytes += _sent(name.removeprefix("c10d::"), arguments)
        return function(*arguments, **(keywords or {}))


def _sent(collective: str, arguments: Sequence[Any]) -> float:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if collective == "alltoall_base_":
        source, splits = arguments[1], list(arguments[4])
        own = splits[rank] / max(1, sum(splits)) if splits else 1 / ranks
        return _bytes(source) * (1 - own)
    if collective == "_allgather_base_":
        return _bytes(arguments[1]) * (ranks - 1)
    if collective == "allreduce_":
        return sum(map(_bytes, arguments[0])) * 2 * (ranks - 1) / ranks
    if collective == "_reduce_scatter_base_":
        return _bytes(arguments[1]) * (ranks - 1) / ranks
    raise AssertionError(f"not known how much {collective} sends")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
