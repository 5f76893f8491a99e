"""What a model sees of the data: each user's history once, and targets that point into it.

U = users, M = behaviours of all users, T = targets, N = longest window.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from embeddings.interval import interval_bucket


class _Tensors:
    """A dataclass whose fields are tensors, None, or dictionaries and dataclasses of the same kind."""

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        def apply(value: object) -> object:
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, _Tensors):
                return value._map(function)
            if isinstance(value, dict):
                return {name: apply(part) for name, part in value.items()}
            return value

        assert is_dataclass(self)
        return type(self)(**{field.name: apply(getattr(self, field.name)) for field in fields(self)})

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """The same on ``device``; TorchRec's train pipelines call it."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that ``stream`` uses the tensors; TorchRec's train pipelines call it."""

        def record(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        self._map(record)


@dataclass(frozen=True)
class PaddedHistory(_Tensors):
    """A window a target, in time order, padded at the end with id 0."""

    item_TN: Tensor
    category_TN: Tensor
    position_TN: Tensor
    """int32: 1 = the latest behaviour before the target; 0 = padding."""
    interval_TN: Tensor
    """int32: bucket of the seconds between behaviour and target (see ``interval_bucket``); 0 = padding."""
    behavior_TN: Tensor | None
    scene_TN: Tensor | None
    valid_TN: Tensor
    """bool: False = padding."""


@dataclass(frozen=True)
class History(_Tensors):
    """Behaviours of U users, flat and in time order; target t sees the window [start_T[t], end_T[t])."""

    item_M: Tensor
    """int32, dense ids, 0 = unknown."""
    category_M: Tensor
    """int32, dense ids, 0 = unknown."""
    timestamp_M: Tensor
    """int64, seconds."""
    behavior_M: Tensor | None
    """int32, None where the data has no behaviour types."""
    scene_M: Tensor | None
    """int32, None where the data has no scenes."""
    offset_U: Tensor
    """int64, (U + 1,): user u's behaviours are offset_U[u] .. offset_U[u + 1]."""
    start_T: Tensor
    """int64, first behaviour of each target's window, counted in M."""
    end_T: Tensor
    """int64, end of each window, counted in M; all behaviours before it are strictly earlier than the target."""

    def kjt(self) -> KeyedJaggedTensor:
        """Ids of the behaviours, each once: keys item, category[, behavior][, scene]; stride U."""
        columns = {"item": self.item_M, "category": self.category_M}
        if self.behavior_M is not None:
            columns["behavior"] = self.behavior_M
        if self.scene_M is not None:
            columns["scene"] = self.scene_M
        lengths = self.offset_U.diff().to(torch.int32)
        return KeyedJaggedTensor(
            keys=list(columns), values=torch.cat(list(columns.values())), lengths=lengths.repeat(len(columns))
        )

    def padded(self, timestamp_T: Tensor) -> PaddedHistory:
        """The windows side by side, (T, N) with N the longest window; for models that need all behaviours at once.

        Args:
            timestamp_T: int64, when the targets were shown, seconds.
        """
        length_T = self.end_T - self.start_T
        longest = int(length_T.max()) if len(length_T) else 0
        column_N = torch.arange(longest, device=length_T.device)
        valid_TN = column_N < length_T[:, None]
        index_TN = torch.where(valid_TN, self.start_T[:, None] + column_N, 0)

        def gather(values_M: Tensor) -> Tensor:
            return torch.where(valid_TN, values_M[index_TN], 0) if len(values_M) else index_TN.to(values_M.dtype)

        interval_TN = interval_bucket(timestamp_T[:, None] - gather(self.timestamp_M))
        return PaddedHistory(
            item_TN=gather(self.item_M),
            category_TN=gather(self.category_M),
            position_TN=torch.where(valid_TN, length_T[:, None] - column_N, 0).to(torch.int32),
            interval_TN=torch.where(valid_TN, interval_TN, 0),
            behavior_TN=None if self.behavior_M is None else gather(self.behavior_M),
            scene_TN=None if self.scene_M is None else gather(self.scene_M),
            valid_TN=valid_TN,
        )


@dataclass(frozen=True)
class Batch(_Tensors, Pipelineable):
    """Targets, and for each sequence of the settings the histories that they point into."""

    histories: dict[str, History]
    """By sequence name; one sequence named ``history`` unless the settings cut several out of it."""
    user_T: Tensor
    """int64, which of the U users a target belongs to."""
    user_id_U: Tensor
    """int64, raw ids."""
    item_T: Tensor
    """int32, dense ids."""
    category_T: Tensor
    """int32, dense ids."""
    timestamp_T: Tensor
    """int64, seconds."""
    scene_T: Tensor | None
    """int32, None where the data has no scenes."""
    label_T: Tensor
    """float32, 0 or 1."""
    origin: str
    """Where the batch comes from, for messages: data set, epoch, step, row groups."""

    def __len__(self) -> int:
        """Number of targets; 0 on a rank that has run out before the others."""
        return len(self.item_T)

    @cached_property
    def users(self) -> int:
        """Number of users."""
        return len(self.user_id_U)

    def target_kjt(self) -> KeyedJaggedTensor:
        """Ids of the targets, bags of one: keys item, category[, scene]; stride T."""
        columns = {"item": self.item_T, "category": self.category_T}
        if self.scene_T is not None:
            columns["scene"] = self.scene_T
        lengths = torch.ones(len(columns) * len(self), dtype=torch.int32, device=self.item_T.device)
        return KeyedJaggedTensor(keys=list(columns), values=torch.cat(list(columns.values())), lengths=lengths)

    def describe(self) -> str:
        """Shapes and types for people, a line each."""
        lines = [f"batch of {len(self)} targets and {self.users} users"]

        def describe(part: object, indent: str) -> None:
            assert is_dataclass(part)
            for field in fields(part):
                value = getattr(part, field.name)
                if isinstance(value, Tensor):
                    shape = "x".join(map(str, value.shape))
                    kind = str(value.dtype).removeprefix("torch.")
                    head = ", ".join(map(str, value[:4].tolist()))
                    lines.append(f"{indent}{field.name:12} {kind:8} {shape:>8}  {head}, ...")

        describe(self, "  ")
        for name, history in self.histories.items():
            lines.append(f"  {name}:")
            describe(history, "    ")
        return "\n".join(lines)
