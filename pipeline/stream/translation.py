"""Rows of one data set with the ids of another: what a model needs that was trained on that other one.

M = behaviours of all users, T = targets of all users.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.stream.data_set import DataSet
from pipeline.stream.row_group import RowGroup
from schemas.errors import UserError
from schemas.manifest import Manifest

PLURAL = {"item": "items", "category": "categories", "behavior": "behaviour types", "scene": "scenes"}
"""Kinds of ids in words, for messages."""


@dataclass(frozen=True)
class Translation:
    """For each kind of id, the other data set's id of each of this one's; 0, the unknown, for what it does not know."""

    ids: dict[str, NDArray[np.int32]]
    """By ``item``, ``category``, ``behavior``, ``scene``: (largest id of this data set + 1,)."""
    manifest: Manifest
    """The other data set's."""

    @classmethod
    def between(cls, data: DataSet, trained: DataSet) -> Self:
        """Match the dictionaries of two data sets by raw id.

        Args:
            data: the data set that is read.
            trained: the one whose ids are wanted.

        Raises:
            UserError: a dictionary cannot be read, or raw ids are of another type.
        """
        ids = {
            kind: _matched(*(each.manifest.verified(each.folder, file) for each in (data, trained)))
            for kind, file in (("item", "items.parquet"), ("category", "categories.parquet"))
        }
        for kind, here, there in (
            ("behavior", data.manifest.behaviors, trained.manifest.behaviors),
            ("scene", data.manifest.scenes, trained.manifest.scenes),
        ):
            if here is not None:
                number = {name: index for index, name in enumerate(there or (), 1)}
                ids[kind] = np.array([0, *(number.get(name, 0) for name in here)], np.int32)
        return cls(ids, trained.manifest)

    @property
    def unknown(self) -> dict[str, int]:
        """How many ids of each kind the other data set does not know."""
        return {kind: int((of_kind[1:] == 0).sum()) for kind, of_kind in self.ids.items()}

    def of(self, group: RowGroup) -> RowGroup:
        """A row group with the other data set's ids; what items its targets are here stays, as ``own_item``."""

        def translated(columns: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            return {name: self.ids[name][column] if name in self.ids else column for name, column in columns.items()}

        target_T = translated(group.target_T) | {"own_item": group.target_T["item"]}
        return replace(group, history_M=translated(group.history_M), target_T=target_T)


def read_dictionary(file: Path) -> pa.Table:
    """Raw and dense ids of a dictionary, (raw_id, id).

    Raises:
        UserError: it cannot be read.
    """
    try:
        return pq.read_table(file, columns=["raw_id", "id"])
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read ({' '.join(str(error).split())}); prepare the data set again") from None


def _matched(here: Path, there: Path) -> NDArray[np.int32]:
    ours, theirs = read_dictionary(here), read_dictionary(there)
    if ours["raw_id"].type != theirs["raw_id"].type:
        raise UserError(
            f"{here}: raw ids are {ours['raw_id'].type}, those of {there} are {theirs['raw_id'].type}; "
            "prepare both from logs of one kind"
        )
    index = pc.index_in(ours["raw_id"], theirs["raw_id"].combine_chunks())
    ids = np.zeros(len(ours) + 1, np.int32)
    ids[ours["id"].to_numpy()] = pc.fill_null(theirs["id"].take(index), 0).to_numpy()
    return ids
