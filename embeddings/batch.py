"""What a model sees of the data: each user's history once, targets that point into it, and behaviours selected of it.

Many targets of a user share one history. So a history is not padded and not repeated: it is flat, and a target has a
window of it, [start_T[t], end_T[t]).

U = users, M = behaviours of all users, T = targets, N = longest window, K = behaviours selected of each target's
window, X = any shape, B = bags of a data set, U = those that are asked for, E = ids of bags, L = rows, d = their dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

if TYPE_CHECKING:
    from pyarrow import StringArray


class _Tensors:
    """A base for dataclasses whose fields are tensors, None, or dictionaries and dataclasses of this kind."""

    def _map(
        self, function: Callable[[Tensor], Tensor], of_bags: Callable[["Bags"], "Bags"] = lambda bags: bags
    ) -> Self:
        def apply(value: object) -> object:
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, _Tensors):
                return value._map(function, of_bags)
            if isinstance(value, Bags):
                return of_bags(value)
            if isinstance(value, dict):
                return {name: apply(part) for name, part in value.items()}
            return value

        assert is_dataclass(self)
        return type(self)(**{field.name: apply(getattr(self, field.name)) for field in fields(self)})

    # What TorchRec's pipelines want of a batch (`torchrec.streamable.Pipelineable`), and `pin_memory` for those who
    # copy it.
    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """Copy all tensors to ``device``; TorchRec's train pipelines call it."""
        return self._map(
            lambda tensor: tensor.to(device, non_blocking=non_blocking), lambda bags: bags.to(torch.device(device))
        )

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


class DistinctBags(NamedTuple):
    """Those of a data set's bags that some numbers stand for, each once; the empty bag is always the first of them."""

    slot_X: Tensor
    """int64: which of the U bags each number stands for."""
    offset_U1: Tensor
    """int64, (U + 1,): the ids of bag u are offset_U1[u] .. offset_U1[u + 1]."""
    id_E: Tensor
    """int32, the ids of all of them."""

    def means(self, rows_Ld: Tensor, index_E: Tensor) -> Tensor:
        """The mean of each bag's rows, (U, d); 0 for the empty bag.

        Args:
            rows_Ld: floats.
            index_E: integer, which of them is the row of each id.
        """
        mean_Ud: Tensor = embedding_bag(index_E.long(), rows_Ld, self.offset_U1, mode="mean", include_last_offset=True)
        return mean_Ud


class Bags:
    """The sets of ids that a feature of several values has in a data set, by number; number 0 is the empty set.

    All batches of a data set share the object, and its copy on another device is made once.

    Args:
        offset_B1: int64, (B + 1,): the ids of bag b are offset_B1[b] .. offset_B1[b + 1].
        id_E: int32, the ids of all bags, ascending within each.
    """

    def __init__(self, offset_B1: Tensor, id_E: Tensor) -> None:
        self.offset_B1, self.id_E = offset_B1, id_E
        self._copies = {offset_B1.device: self}

    def __len__(self) -> int:
        """Number of bags, the empty one included."""
        return len(self.offset_B1) - 1

    @cached_property
    def largest(self) -> int:
        """The largest id of all bags; on a GPU the host waits for it once."""
        return int(self.id_E.max()) if len(self.id_E) else 0

    def distinct(self, number_X: Tensor) -> DistinctBags:
        """The bags that some numbers stand for, each once; on a GPU the host waits for how many there are.

        Args:
            number_X: integer, 0 .. B - 1.
        """
        # A flag for each bag, rather than `unique`, which would sort all numbers. Counting the flags numbers them.
        present_B = torch.zeros(len(self), dtype=torch.bool, device=number_X.device)
        present_B[:1] = True
        present_B.index_fill_(0, number_X.flatten().long(), True)
        slot_B = present_B.cumsum(0) - 1
        number_U = present_B.nonzero().flatten()
        length_U, id_E = self.each(number_U)
        return DistinctBags(slot_B[number_X.long()], pad(length_U.cumsum(0), (1, 0)), id_E)

    def each(self, number_X: Tensor) -> tuple[Tensor, Tensor]:
        """How many ids each of some bags has, int64 (X,), and the ids of all of them, one bag's after the other's.

        On a GPU the host waits for how many they are.
        """
        start_X = self.offset_B1.index_select(0, number_X.long())
        length_X = self.offset_B1.index_select(0, number_X.long() + 1) - start_X
        shift_E = (start_X - (length_X.cumsum(0) - length_X)).repeat_interleave(length_X)
        return length_X, self.id_E.index_select(0, shift_E + torch.arange(len(shift_E), device=shift_E.device))

    def to(self, device: torch.device) -> "Bags":
        """The bags on ``device``, copied at the first call alone."""
        device = torch.empty(0, device=device).device  # "cuda" is that of a number
        if device not in self._copies:
            copy = Bags(self.offset_B1.to(device), self.id_E.to(device))
            copy._copies = self._copies
            self._copies[device] = copy
        return self._copies[device]


@dataclass(frozen=True)
class History(_Tensors):
    """Behaviours of U users, flat and in time order; target t sees the window [start_T[t], end_T[t])."""

    item_M: Tensor
    """int32, dense ids, 0 = unknown."""
    timestamp_M: Tensor
    """int64, seconds."""
    features_M: dict[str, Tensor]
    """By name, what belongs to the behaviours and to their items: int32, ids or numbers of bags, 0 = unknown; float32,
    numbers that stay numbers."""
    offset_U: Tensor
    """int64, (U + 1,): user u's behaviours are offset_U[u] .. offset_U[u + 1]."""
    start_T: Tensor
    """int64, first behaviour of each target's window, counted in M."""
    end_T: Tensor
    """int64, end of each window, counted in M; all behaviours before it are strictly earlier than the target."""

    def column(self, feature: str) -> Tensor:
        """The column (M,) of ``item``, or of a feature of behaviours or their items."""
        return self.item_M if feature == "item" else self.features_M[feature]


@dataclass(frozen=True)
class Batch(_Tensors):
    """Targets, and for each sequence of the settings the histories that they point into."""

    histories: dict[str, History]
    """By sequence name; one sequence named ``history`` unless the settings cut several out of it."""
    user_T: Tensor
    """int64, which of the U users a target belongs to."""
    user_id_U: Tensor
    """int64, raw ids; where these are text, the number of each user's row in the data set. No model looks at it."""
    item_T: Tensor
    """int32, dense ids."""
    timestamp_T: Tensor
    """int64, seconds."""
    features_T: dict[str, Tensor]
    """By name, what belongs to the targets' items, to the impressions, and to behaviours where targets have it too;
    types as those of `History.features_M`."""
    labels_T: dict[str, Tensor]
    """By name, float32, 0 or 1; -1 where there is no label. The first one is the main label."""
    origin: str
    """Where the batch comes from, for messages: data set, epoch, step, row groups."""
    features_U: dict[str, Tensor] = field(default_factory=dict)
    """By name, what belongs to the users; types as those of `History.features_M`."""
    weight_T: Tensor | None = None
    """float32, 0 or more: how much each target counts; None: all alike."""
    bags: dict[str, Bags] = field(default_factory=dict)
    """By the name of each feature with several values: which ids each number of a bag stands for."""
    line_T: Tensor | None = None
    """int64, which lines of the impressions the targets are; None where it is not read. No model looks at it."""
    user_text_U: "StringArray | None" = None
    """Raw ids of the users where these are text; None where they are integers. No model looks at it."""
    own_item_T: Tensor | None = None
    """int32, ids that the items have in the data set that is read; None where these are the rows of the model's table,
    as in ``item_T``. No model looks at it."""
    history_end_T: Tensor | None = None
    """int32, how many behaviours each target's user has before it, however few the windows hold; None where it is not
    read. No model looks at it."""
    first_behavior_T: Tensor | None = None
    """int64, seconds of the first behaviour of each target's user, before or after the target; the largest
    int64 where there is none; None where it is not read. No model looks at it."""

    def __len__(self) -> int:
        """Number of targets; 0 on a rank that has run out before the others."""
        return len(self.item_T)

    @property
    def label_T(self) -> Tensor:
        """float32: the main label, 0 or 1; -1 where there is none."""
        return next(iter(self.labels_T.values()))

    def column(self, feature: str) -> Tensor:
        """The column (T,) of ``item``, or of a feature that targets have."""
        return self.item_T if feature == "item" else self.features_T[feature]

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
            for each in fields(part):
                value = getattr(part, each.name)
                tensors = {each.name: value} if isinstance(value, Tensor) else {}
                if isinstance(value, dict):
                    tensors = {name: part for name, part in value.items() if isinstance(part, Tensor)}
                for name, value in tensors.items():
                    shape = "x".join(map(str, value.shape))
                    kind = str(value.dtype).removeprefix("torch.")
                    head = ", ".join(map(str, value[:4].tolist()))
                    lines.append(f"{indent}{name:12} {kind:8} {shape:>8}  {head}, ...")

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

    @classmethod
    def latest(cls, history: History, count: int) -> Self:
        """Select the latest behaviours of each window, at most ``count``, the latest first."""
        # Windows end right before their target, so these are the last of the window: nothing needs to be compared.
        index_TK = history.end_T[:, None] - torch.arange(1, count + 1, device=history.end_T.device)
        valid_TK = index_TK >= history.start_T[:, None]
        return cls(torch.where(valid_TK, index_TK, 0), valid_TK)


class Branch(NamedTuple):
    """Behaviours that are attended to and pooled together: those retrieved of a sequence, or the latest of it."""

    sequence: str
    chosen: Selection


def gather_or_zeros(values_M: Tensor, index_X: Tensor) -> Tensor:
    """``values_M[index_X]``, or zeros if there are no values at all.

    A rank may have targets whose windows are all empty; their padding indexes row 0, which then does not exist.
    """
    if not len(values_M):
        return values_M.new_zeros(*index_X.shape, *values_M.shape[1:])
    return values_M[index_X]
