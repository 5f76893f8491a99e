"""What a model sees of the data: each user's history once, targets that point into it, and behaviours selected of it.

Many targets of a user share one history. So a history is not padded and not repeated: it is flat, and a target has a
window of it, [start_T[t], end_T[t]).

U = users, M = behaviours of all users, T = targets, N = longest window, K = behaviours selected of each target's
window, X = any shape.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor
from torchrec.streamable import Pipelineable


class _Tensors:
    """A base for dataclasses whose fields are tensors, None, or dictionaries and dataclasses of this kind."""

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

    # What TorchRec's pipelines want of a batch (`torchrec.streamable.Pipelineable`), and `pin_memory` for those who
    # copy it.
    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """Copy all tensors to ``device``; TorchRec's train pipelines call it."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Copy all tensors to page-locked memory, from which a GPU can copy while the CPU goes on."""
        return self._map(lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that ``stream`` uses the tensors; TorchRec's train pipelines call it."""

        def record(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        # The new batch that `_map` makes is dropped: its tensors are the old ones, and only the allocator knows more of
        # them.
        self._map(record)


@dataclass(frozen=True)
class History(_Tensors):
    """Behaviours of U users, flat and in time order; target t sees the window [start_T[t], end_T[t])."""

    item_M: Tensor
    """int32, dense ids, 0 = unknown."""
    category_M: Tensor
    """int32, dense ids, 0 = unknown."""
    timestamp_M: Tensor
    """int64, seconds."""
    behavior_type_M: Tensor | None
    """int32, None where the data has no behaviour types."""
    scene_M: Tensor | None
    """int32, None where the data has no scenes."""
    offset_U: Tensor
    """int64, (U + 1,): user u's behaviours are offset_U[u] .. offset_U[u + 1]."""
    start_T: Tensor
    """int64, first behaviour of each target's window, counted in M."""
    end_T: Tensor
    """int64, end of each window, counted in M; all behaviours before it are strictly earlier than the target."""


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
    """float32, 0 or 1; -1 where there is no label."""
    origin: str
    """Where the batch comes from, for messages: data set, epoch, step, row groups."""
    line_T: Tensor | None = None
    """int64, which lines of the impressions the targets are; None where it is not read. No model looks at it."""
    own_item_T: Tensor | None = None
    """int32, ids that the items have in the data set that is read; None where these are the model's. No model looks."""

    def __len__(self) -> int:
        """Number of targets; 0 on a rank that has run out before the others."""
        return len(self.item_T)

    # A frozen dataclass may have it, because `cached_property` writes into ``__dict__`` and not through
    # ``__setattr__``.
    @cached_property
    def users(self) -> int:
        """Number of users."""
        return len(self.user_id_U)

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


@dataclass(frozen=True)
class Selection:
    """What a search returns: for each target K of the M behaviours, the best first."""

    index_TK: Tensor
    """int64, counted in M; 0 where there is none."""
    valid_TK: Tensor
    """bool; False where the window has fewer than K behaviours."""
    log_count_TK: Tensor | None = None
    """float32: the logarithm of how many behaviours each one stands for; None: each stands for itself alone."""

    @classmethod
    def everything(cls, history: History) -> Self:
        """Select all behaviours of each window, in time order, padded to N."""
        length_T = history.end_T - history.start_T
        # The longest window of this batch, not the N of the settings: padding costs rows in every step that follows. On
        # a GPU the host waits here.
        longest = int(length_T.max()) if len(length_T) else 0
        column_N = torch.arange(longest, device=length_T.device)
        valid_TN = column_N < length_T[:, None]
        return cls(torch.where(valid_TN, history.start_T[:, None] + column_N, 0), valid_TN)


def gather_or_zeros(values_M: Tensor, index_X: Tensor) -> Tensor:
    """``values_M[index_X]``, or zeros if there are no values at all.

    A rank may have targets whose windows are all empty; their padding indexes row 0, which then does not exist.
    """
    if not len(values_M):
        return values_M.new_zeros(*index_X.shape, *values_M.shape[1:])
    return values_M[index_X]
