"""Targets and the histories they look into, as numpy arrays: what a row group, a shuffle buffer and a batch all are.

A history is stored once for each user. A target sees a window of it: the last N behaviours before the target, out of
all or out of those of some types or scenes. Each such sequence of the settings is cut out of the history when a row
group has been read; batches then take targets, and of the sequences what their windows reach.

U = users, M = behaviours of all users, T = targets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embeddings.batch import Batch, History
from pipeline.stream.row_group import RowGroup
from schemas.errors import UserError
from schemas.manifest import Manifest
from schemas.stream import StreamSettings

I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """A sequence of each user, one after the other, and each target's window of it; both are given as indices in M."""

    columns_M: dict[str, NDArray[Any]]
    """item, category, timestamp; behavior and scene where the data have them."""
    offset_U: I64
    """(U + 1,): user u's behaviours are offset_U[u] .. offset_U[u + 1]."""
    start_T: I64
    """First behaviour that each target sees."""
    end_T: I64
    """One after the last behaviour that each target sees."""

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Put parts with different users one after the other."""
        base = np.cumsum([0] + [part.offset_U[-1] for part in parts])
        return cls(
            {name: np.concatenate([part.columns_M[name] for part in parts]) for name in parts[0].columns_M},
            np.concatenate([part.offset_U[:-1] + b for part, b in zip(parts, base, strict=False)] + [base[-1:]]),
            np.concatenate([part.start_T + b for part, b in zip(parts, base, strict=False)]),
            np.concatenate([part.end_T + b for part, b in zip(parts, base, strict=False)]),
        )

    def take(self, index_T: I64, user_T: I64, order_T: I64, first_U: I64) -> Self:
        """Take the windows of some targets, and of each user the behaviours from the earliest start to the latest end.

        Args:
            index_T: the targets.
            user_T: their users, numbered anew from 0.
            order_T: sorts ``user_T``.
            first_U: where each user begins in that order.
        """
        # Of each user the one range that covers all of its windows here.
        start_T, end_T = self.start_T[index_T], self.end_T[index_T]
        if len(first_U):
            begin_U = np.minimum.reduceat(start_T[order_T], first_U)
            length_U = np.maximum.reduceat(end_T[order_T], first_U) - begin_U
        else:  # reduceat wants at least one user
            begin_U = length_U = np.zeros(0, np.int64)
        # Ranges are put one after the other; where each begins, and which old index each behaviour has.
        offset_U = np.zeros(len(first_U) + 1, np.int64)
        np.cumsum(length_U, out=offset_U[1:])
        # How far each user's behaviours move towards the front.
        shift_U = begin_U - offset_U[:-1]
        index_M = np.repeat(shift_U, length_U)
        # In place: it is the largest array here.
        index_M += np.arange(len(index_M))
        shift_T = shift_U[user_T]
        columns_M = {name: column_M.take(index_M) for name, column_M in self.columns_M.items()}
        return type(self)(columns_M, offset_U, start_T - shift_T, end_T - shift_T)

    def history(self) -> History:
        """The sequence and the windows as a `History` of tensors, which share the arrays' memory."""
        columns_M = {name: torch.from_numpy(column_M) for name, column_M in self.columns_M.items()}
        return History(
            item_M=columns_M.pop("item"),
            timestamp_M=columns_M.pop("timestamp"),
            features_M=columns_M,
            offset_U=torch.from_numpy(self.offset_U),
            start_T=torch.from_numpy(self.start_T),
            end_T=torch.from_numpy(self.end_T),
        )


@dataclass(frozen=True)
class HistorySamples:
    """Targets and their users' histories."""

    user_id_U: I64
    user_T: I64
    """The row in U of each target's user."""
    columns_T: dict[str, NDArray[Any]]
    """item, category, timestamp, label; scene and line where the data have them and they are read; own_item
    where ids were translated."""
    sequences: dict[str, Windows]
    """By the name of the sequence in the settings."""

    def __len__(self) -> int:
        return len(self.user_T)

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Put parts with different users one after the other."""
        # Most batches are cut from one block: nothing to copy.
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
        """Take some targets, in the order of ``index_T``, with the users and behaviours that they need, each once."""
        # Users in ascending order, numbered anew; targets stay in the order that was asked for.
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
        """The samples as a `Batch` of tensors, which share the arrays' memory.

        Args:
            origin: where the batch comes from, for messages.
        """
        columns_T: dict[str, Tensor] = {name: torch.from_numpy(column_T) for name, column_T in self.columns_T.items()}
        item_T, timestamp_T, label_T = (columns_T.pop(name) for name in ("item", "timestamp", "label"))
        line_T, own_item_T = columns_T.pop("line", None), columns_T.pop("own_item", None)
        return Batch(
            histories={name: windows.history() for name, windows in self.sequences.items()},
            user_T=torch.from_numpy(self.user_T),
            user_id_U=torch.from_numpy(self.user_id_U),
            item_T=item_T,
            timestamp_T=timestamp_T,
            features_T=columns_T,
            labels_T={"label": label_T.to(torch.float32)},
            line_T=line_T,
            own_item_T=own_item_T,
            origin=origin,
        )


ONLY_SEQUENCE = "history"
"""Name of the sequence where the settings cut none."""


@dataclass(frozen=True)
class SequenceCut:
    """How a sequence of the settings is cut out of a history, its names of types and scenes resolved to ids."""

    length: int
    """N: a target sees the last N behaviours of the sequence."""
    allowed: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    """For ``behavior`` and ``scene``, as far as they matter: whether an id belongs to the sequence, by id."""

    def windows(self, group: RowGroup) -> Windows:
        """The sequence of each user in ``group``, and the windows of all its targets."""
        columns_M, offset_U = group.history_M, group.history_offset_U
        # ``history_end`` is counted within the user's history, indices here in the flat array of all users.
        end_T = offset_U[:-1][group.user_T] + group.target_T["history_end"]
        if self.allowed:
            kept_M = np.logical_and.reduce([allowed[columns_M[name]] for name, allowed in self.allowed.items()])
            # How many behaviours of the sequence come before each behaviour: turns an index in the history into the
            # index in the sequence.
            before_M = np.zeros(len(kept_M) + 1, np.int64)
            np.cumsum(kept_M, out=before_M[1:])
            columns_M = {name: column_M[kept_M] for name, column_M in columns_M.items()}
            offset_U, end_T = before_M[offset_U], before_M[end_T]
        start_T = np.maximum(offset_U[:-1][group.user_T], end_T - self.length)
        return Windows(columns_M, offset_U, start_T, end_T)


def samples_of(group: RowGroup, cuts: Mapping[str, SequenceCut]) -> HistorySamples:
    """All targets of a row group, of every split, and their users' sequences."""
    columns_T = {name: column for name, column in group.target_T.items() if name not in ("split", "history_end")}
    return HistorySamples(
        group.user_id_U, group.user_T, columns_T, {name: cut.windows(group) for name, cut in cuts.items()}
    )


def resolve_sequences(settings: StreamSettings, manifest: Manifest) -> dict[str, SequenceCut]:
    """Look up the ids of the names in the settings' sequences; by the name of the sequence.

    Raises:
        UserError: a behaviour type or a scene that the data set does not have.
    """
    if settings.sequences is None:
        return {ONLY_SEQUENCE: SequenceCut(settings.history_length)}
    cuts = {}
    for name, sequence in settings.sequences.items():
        allowed = {}
        for kind, wanted, known in (
            ("behavior", sequence.behavior, manifest.behaviors),
            ("scene", sequence.scene, manifest.scenes),
        ):
            if wanted is not None:
                allowed[kind] = _allowed(f"sequences.{name}.{kind}", wanted, known)
        cuts[name] = SequenceCut(sequence.length, allowed)
    return cuts


def _allowed(key: str, wanted: tuple[str, ...], known: tuple[str, ...] | None) -> NDArray[np.bool_]:
    if known is None:
        raise UserError(f"{key}: the data set has no such column; prepare it with one, or leave this setting out")
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UserError(f"{key}: {', '.join(unknown)} is not in the data set; it has {', '.join(known)}")
    # Id 0 is unknown: it belongs to no sequence that asks for something.
    return np.array([False] + [name in wanted for name in known])
