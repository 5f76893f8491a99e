"""Sequences cut out of a user's history: the last N behaviours before a target, of all or of some types or scenes.

U = users, M = behaviours of all users, T = targets.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.stream.row_group import RowGroup
from pipeline.stream.samples import Samples, Windows
from schemas.manifest import Manifest
from schemas.stream import StreamSettings

ONLY_SEQUENCE = "history"
"""Name of the sequence where the settings cut none."""


@dataclass(frozen=True)
class Cut:
    """A sequence of the settings, its names resolved to ids."""

    length: int
    allowed: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    """For ``behavior`` and ``scene``, as far as they matter: whether an id belongs to the sequence, by id."""

    def windows(self, group: RowGroup) -> Windows:
        """The sequence of each user in ``group``, and the windows of all its targets."""
        columns_M, offset_U = group.history_M, group.history_offset_U
        end_T = offset_U[:-1][group.user_T] + group.target_T["history_end"]
        if self.allowed:
            kept_M = np.logical_and.reduce([allowed[columns_M[name]] for name, allowed in self.allowed.items()])
            # Behaviours of the sequence before each behaviour: a place in the history to a place in the sequence.
            before_M = np.zeros(len(kept_M) + 1, np.int64)
            np.cumsum(kept_M, out=before_M[1:])
            columns_M = {name: column_M[kept_M] for name, column_M in columns_M.items()}
            offset_U, end_T = before_M[offset_U], before_M[end_T]
        start_T = np.maximum(offset_U[:-1][group.user_T], end_T - self.length)
        return Windows(columns_M, offset_U, start_T, end_T)


def samples_of(group: RowGroup, cuts: Mapping[str, Cut]) -> Samples:
    """All targets of a row group, of whatever split, and their users' sequences."""
    columns_T = {name: column for name, column in group.target_T.items() if name not in ("split", "history_end")}
    return Samples(group.user_id_U, group.user_T, columns_T, {name: cut.windows(group) for name, cut in cuts.items()})


def resolve_sequences(settings: StreamSettings, manifest: Manifest) -> dict[str, Cut]:
    """The sequences of the settings, with the data set's ids in place of names.

    Raises:
        ValueError: a behaviour type or a scene that the data set does not have.
    """
    if settings.sequences is None:
        return {ONLY_SEQUENCE: Cut(settings.history_length)}
    cuts = {}
    for name, sequence in settings.sequences.items():
        allowed = {}
        for kind, wanted, known in (
            ("behavior", sequence.behavior, manifest.behaviors),
            ("scene", sequence.scene, manifest.scenes),
        ):
            if wanted is not None:
                allowed[kind] = _allowed(f"sequences.{name}.{kind}", wanted, known)
        cuts[name] = Cut(sequence.length, allowed)
    return cuts


def _allowed(key: str, wanted: tuple[str, ...], known: tuple[str, ...] | None) -> NDArray[np.bool_]:
    if known is None:
        raise ValueError(f"{key}: the data set has no such column; prepare it with one, or leave this setting out")
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"{key}: {', '.join(unknown)} is not in the data set; it has {', '.join(known)}")
    # Id 0 is unknown: it belongs to no sequence that asks for something.
    return np.array([False] + [name in wanted for name in known])
