"""Targets and the histories they look into, as numpy arrays: what a row group, a shuffle buffer and a batch all are.

A history is stored once for each user. A target sees a window of it: the last N behaviours before the target, out of
all or out of those that have some values of some features. Each such sequence of the settings is cut out of the history
when a row group has been read; batches then take targets, and of the sequences what their windows reach.

U = users, M = behaviours of all users, T = targets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from embeddings.batch import Bags, Batch, History
from pipeline.hashing import hash_values
from pipeline.stream.data_set import DataSet, ItemFeatures
from pipeline.stream.row_group import RowGroup
from schemas.errors import UserError
from schemas.shards import label_column
from schemas.stream import ONLY_SEQUENCE, StreamSettings

I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """A sequence of each user, one after the other, and each target's window of it; both are given as indices in M."""

    columns_M: dict[str, NDArray[Any]]
    """item, timestamp; features of behaviours and of their items."""
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
    user_text_U: pa.StringArray | None
    columns_U: dict[str, NDArray[Any]]
    """Features of the users."""
    user_T: I64
    """The row in U of each target's user."""
    columns_T: dict[str, NDArray[Any]]
    """item, timestamp, label and label_NAME, features; weight and line where the data have them and they are read;
    history_end and `FIRST_BEHAVIOR` where they are; own_item where items are not the data set's own ids."""
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
        texts = [part.user_text_U for part in parts if part.user_text_U is not None]
        return cls(
            np.concatenate([part.user_id_U for part in parts]),
            pa.concat_arrays(texts) if texts else None,
            {name: np.concatenate([part.columns_U[name] for part in parts]) for name in parts[0].columns_U},
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
            None if self.user_text_U is None else self.user_text_U.take(pa.array(kept_U)),
            {name: column_U[kept_U] for name, column_U in self.columns_U.items()},
            user_T,
            {name: column_T[index_T] for name, column_T in self.columns_T.items()},
            {name: windows.take(index_T, user_T, order_T, first_U) for name, windows in self.sequences.items()},
        )

    def with_items(self, items: "Items") -> Self:
        """The samples with the features of their items, and the rows that these have in the model."""
        if items.is_empty:
            return self

        def known(columns: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            # Features first: they are those of the data set's own ids, and rare items have them too.
            return columns | items.features.of(columns["item"]) | {"item": items.known(columns["item"])}

        columns_T = known(self.columns_T)
        if items.renames:
            columns_T["own_item"] = self.columns_T["item"]
        sequences = {
            name: replace(windows, columns_M=known(windows.columns_M)) for name, windows in self.sequences.items()
        }
        return replace(self, columns_T=columns_T, sequences=sequences)

    def batch(self, origin: str, labels: Sequence[str] = ("label",), bags: Mapping[str, Bags] | None = None) -> Batch:
        """The samples as a `Batch` of tensors, which share the arrays' memory.

        Args:
            origin: where the batch comes from, for messages.
            labels: names of the labels, the main one first.
            bags: by the name of each feature of several values, its sets of ids; None: no feature has several.
        """
        columns_T: dict[str, Tensor] = {name: torch.from_numpy(column_T) for name, column_T in self.columns_T.items()}
        item_T, timestamp_T = columns_T.pop("item"), columns_T.pop("timestamp")
        labels_T = {
            label: columns_T.pop(label_column(labels, label).removeprefix("target_")).to(torch.float32)
            for label in labels
        }
        names = ("weight", "line", "own_item", "history_end", FIRST_BEHAVIOR)
        beside = {name: columns_T.pop(name, None) for name in names}
        return Batch(
            histories={name: windows.history() for name, windows in self.sequences.items()},
            user_T=torch.from_numpy(self.user_T),
            user_id_U=torch.from_numpy(self.user_id_U),
            item_T=item_T,
            timestamp_T=timestamp_T,
            features_T=columns_T,
            labels_T=labels_T,
            features_U={name: torch.from_numpy(column_U) for name, column_U in self.columns_U.items()},
            weight_T=beside["weight"],
            bags=dict(bags or {}),
            line_T=beside["line"],
            user_text_U=self.user_text_U,
            own_item_T=beside["own_item"],
            history_end_T=beside["history_end"],
            first_behavior_T=beside[FIRST_BEHAVIOR],
            origin=origin,
        )


@dataclass(frozen=True)
class Items:
    """What a stream makes of the ids of items in shards: features of theirs, and the rows that a model has of them."""

    features: ItemFeatures
    largest: int
    """The largest row of the model's table of items; where ids are rows, larger ids are unknown to it."""
    renames: bool
    """Whether an id may become another one."""
    known_I: NDArray[np.int32] | None = None
    """By id in the shards, the row in the model's table; None: the same number."""

    @property
    def is_empty(self) -> bool:
        """Whether samples stay as they are."""
        return not (self.renames or self.features.columns_I)

    def known(self, item_X: NDArray[np.int32]) -> NDArray[np.int32]:
        """The rows of items in the model's table."""
        if self.known_I is not None:
            return self.known_I.take(item_X)
        return np.where(item_X > self.largest, np.int32(0), item_X) if self.renames else item_X


_SHOWN = 20
"""Values of a feature that a message lists."""


@dataclass(frozen=True)
class SequenceCut:
    """How a sequence of the settings is cut out of a history, the raw values of its conditions resolved to ids."""

    length: int
    """N: a target sees the last N behaviours of the sequence."""
    allowed: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    """By the name of each feature with a condition: whether an id, or a set, belongs to the sequence, by number."""

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


FIRST_BEHAVIOR = "history.first"
"""Column of targets: when their user had the first behaviour. No feature can have such a name."""


def samples_of(group: RowGroup, cuts: Mapping[str, SequenceCut], *, whole_histories: bool = False) -> HistorySamples:
    """All targets of a row group, of every split, and their users' sequences.

    Args:
        group: the row group.
        cuts: the sequences of the settings.
        whole_histories: targets have columns about their users' whole histories.
    """
    columns_T = {name: column for name, column in group.target_T.items() if name not in ("split", "history_end")}
    if whole_histories:
        columns_T |= {
            "history_end": group.target_T["history_end"],
            FIRST_BEHAVIOR: group.first_behavior_U[group.user_T],
        }
    return HistorySamples(
        group.user_id_U,
        group.user_text_U,
        group.user_U,
        group.user_T,
        columns_T,
        {name: cut.windows(group) for name, cut in cuts.items()},
    )


def resolve_sequences(settings: StreamSettings, data_set: DataSet, bags: Mapping[str, Bags]) -> dict[str, SequenceCut]:
    """Look up the ids of the values in the conditions of the settings' sequences; by the name of the sequence.

    Args:
        settings: of the stream.
        data_set: whose ids the sequences are cut by.
        bags: sets of ids, by feature.

    Raises:
        UserError: a feature or a value that the data set does not have.
    """
    if settings.sequences is None:
        return {ONLY_SEQUENCE: SequenceCut(settings.history_length)}
    return {
        name: SequenceCut(
            sequence.length,
            {
                feature: _allowed(f"sequences.{name}.{key}", feature, wanted, data_set, bags)
                for feature, (key, wanted) in sequence.conditions.items()
            },
        )
        for name, sequence in settings.sequences.items()
    }


def _allowed(
    key: str, feature: str, wanted: tuple[str | int, ...], data_set: DataSet, bags: Mapping[str, Bags]
) -> NDArray[np.bool_]:
    behaviors = [each.name for each in data_set.manifest.features_of("behavior")]
    if feature not in behaviors:
        known = f" (it has {', '.join(behaviors)})" if behaviors else ""
        raise UserError(
            f"{key}: the data set has no such column{known}; prepare it with one, or leave this setting out"
        )
    record, texts = data_set.feature(feature), [str(value) for value in wanted]
    # Id 0 is unknown: it belongs to no sequence that asks for something.
    allowed = np.zeros(record.rows + 1, np.bool_)
    if record.encoding == "scale":
        raise UserError(f"{key}: {feature} is a number that stays one, which has no values to choose; leave it out")
    if record.encoding == "hash":
        if record.type == "integer" and not all(text.removeprefix("-").isdecimal() for text in texts):
            raise UserError(f"{key}: values of {feature} are integers; give integers")
        raw = pa.array(texts) if record.type == "text" else pa.array([int(text) for text in texts])
        allowed[1 + hash_values(raw).to_numpy() % record.rows] = True
    else:
        # Quantiles have no names but their numbers.
        quantiles = pa.array([None, *range(1, record.rows + 1)], pa.int64())
        names = data_set.names(feature) if record.encoding == "dictionary" else quantiles
        found = pc.index_in(pa.array(texts), names.cast(pa.string())).to_pylist()
        unknown = [text for text, id in zip(texts, found, strict=True) if id is None]
        if unknown:
            several = names.drop_null().cast(pa.string())
            more = f", ... ({len(several)} in all)" if len(several) > _SHOWN else ""
            raise UserError(
                f"{key}: {', '.join(unknown)} is not in the data set; it has "
                f"{', '.join(several.slice(0, _SHOWN).to_pylist())}{more}"
            )
        allowed[found] = True
    if record.kind != "ids":
        return allowed
    # A set belongs to the sequence if one of its ids does.
    offset_B1, id_E = (tensor.numpy() for tensor in (bags[feature].offset_B1, bags[feature].id_E))
    before_E = np.concatenate([[0], np.cumsum(allowed[id_E])])
    has_one_B: NDArray[np.bool_] = np.diff(before_E[offset_B1]) > 0
    return has_one_B
