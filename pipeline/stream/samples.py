"""Targets and the histories they look into, as numpy arrays: what a row group, a shuffle buffer and a batch all are.

U = users, T = targets, M = behaviours of all users.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embeddings.batch import Batch, History

I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """A sequence of each user, flat, and each target's window of it. Offsets and windows count in M."""

    columns_M: dict[str, NDArray]
    """item, category, timestamp[, behavior][, scene]."""
    offset_U: I64
    """(U + 1,): user u's behaviours are offset_U[u] .. offset_U[u + 1]."""
    start_T: I64
    end_T: I64

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """One after the other; the parts have different users."""
        base = np.cumsum([0] + [part.offset_U[-1] for part in parts])
        return cls(
            {name: np.concatenate([part.columns_M[name] for part in parts]) for name in parts[0].columns_M},
            np.concatenate([part.offset_U[:-1] + b for part, b in zip(parts, base, strict=False)] + [base[-1:]]),
            np.concatenate([part.start_T + b for part, b in zip(parts, base, strict=False)]),
            np.concatenate([part.end_T + b for part, b in zip(parts, base, strict=False)]),
        )

    def take(self, index_T: I64, user_T: I64, order_T: I64, first_U: I64) -> Self:
        """Windows of some targets, and of each user the behaviours between the earliest start and the latest end.

        Args:
            index_T: the targets.
            user_T: their users, numbered anew from 0.
            order_T: sorts ``user_T``.
            first_U: where each user begins in that order.
        """
        start_T, end_T = self.start_T[index_T], self.end_T[index_T]
        if len(first_U):
            begin_U = np.minimum.reduceat(start_T[order_T], first_U)
            length_U = np.maximum.reduceat(end_T[order_T], first_U) - begin_U
        else:
            begin_U = length_U = np.zeros(0, np.int64)
        offset_U = np.zeros(len(first_U) + 1, np.int64)
        np.cumsum(length_U, out=offset_U[1:])
        shift_U = begin_U - offset_U[:-1]
        index_M = np.repeat(shift_U, length_U)
        index_M += np.arange(len(index_M))
        shift_T = shift_U[user_T]
        columns_M = {name: column_M.take(index_M) for name, column_M in self.columns_M.items()}
        return type(self)(columns_M, offset_U, start_T - shift_T, end_T - shift_T)

    def history(self) -> History:
        """The same as tensors, which share the arrays' memory."""
        columns_M = {name: torch.from_numpy(column_M) for name, column_M in self.columns_M.items()}
        return History(
            item_M=columns_M["item"],
            category_M=columns_M["category"],
            timestamp_M=columns_M["timestamp"],
            behavior_M=columns_M.get("behavior"),
            scene_M=columns_M.get("scene"),
            offset_U=torch.from_numpy(self.offset_U),
            start_T=torch.from_numpy(self.start_T),
            end_T=torch.from_numpy(self.end_T),
        )


@dataclass(frozen=True)
class Samples:
    """Targets and their users' histories."""

    user_id_U: I64
    user_T: I64
    columns_T: dict[str, NDArray]
    """item, category, timestamp, label[, scene]."""
    sequences: dict[str, Windows]

    def __len__(self) -> int:
        return len(self.user_T)

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """One after the other; the parts have different users."""
        if len(parts) == 1:
            return parts[0]
        base = np.cumsum([0] + [len(part.user_id_U) for part in parts])
        return cls(
            np.concatenate([part.user_id_U for part in parts]),
            np.concatenate([part.user_T + b for part, b in zip(parts, base, strict=False)]),
            {name: np.concatenate([part.columns_T[name] for part in parts]) for name in parts[0].columns_T},
            {name: Windows.concatenate([part.sequences[name] for part in parts]) for name in parts[0].sequences},
        )

    def take(self, index_T: I64) -> Self:
        """Some targets, in the order of ``index_T``, with the users and the behaviours that they need, each once."""
        kept_U, user_T = np.unique(self.user_T[index_T], return_inverse=True)
        order_T = np.argsort(user_T, kind="stable")
        first_U = np.searchsorted(user_T[order_T], np.arange(len(kept_U)))
        return type(self)(
            self.user_id_U[kept_U],
            user_T,
            {name: column_T[index_T] for name, column_T in self.columns_T.items()},
            {name: windows.take(index_T, user_T, order_T, first_U) for name, windows in self.sequences.items()},
        )

    def batch(self, origin: str) -> Batch:
        """The same as a batch, which shares the arrays' memory."""
        columns_T: dict[str, Tensor] = {name: torch.from_numpy(column_T) for name, column_T in self.columns_T.items()}
        return Batch(
            histories={name: windows.history() for name, windows in self.sequences.items()},
            user_T=torch.from_numpy(self.user_T),
            user_id_U=torch.from_numpy(self.user_id_U),
            item_T=columns_T["item"],
            category_T=columns_T["category"],
            timestamp_T=columns_T["timestamp"],
            scene_T=columns_T.get("scene"),
            label_T=columns_T["label"].to(torch.float32),
            origin=origin,
        )
