"""Rows of one data set with the ids of another: what a model needs that was trained on that other one.

M = behaviours of all users, T = targets of all users.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from embeddings.batch import Bags
from pipeline.stream.data_set import DataSet, ItemFeatures, encoding
from pipeline.stream.row_group import RowGroup
from schemas.errors import UserError

PLURAL = {"item": "items", "category": "categories", "behavior": "behaviour types", "scene": "scenes"}
"""Kinds of ids in words, for messages; others are values of the feature."""

_OF_THE_DATA = ("deviation", "edges", "mean")


@dataclass(frozen=True)
class Translation:
    """For each kind of id, the other data set's id of each of this one's; 0, the unknown, for what it does not know.

    Of items it is the row in the other's table, which may lie elsewhere than at the id.
    """

    ids: dict[str, NDArray[np.int32]]
    """By ``item`` and the name of each feature that has a dictionary: (largest id of this data set + 1,)."""
    bags: dict[str, Bags]
    """This data set's sets of ids, by the name of the feature, in the other one's ids."""
    trained: DataSet
    """The other data set."""

    @classmethod
    def between(cls, data: DataSet, trained: DataSet, features: Collection[str] | None = None) -> Self:
        """Match the dictionaries of two data sets by raw id, or by id where one of them continues the other.

        Args:
            data: the data set that is read.
            trained: the one whose ids are wanted.
            features: names of those that are read; None: all that both have.

        Raises:
            UserError: a dictionary cannot be read, raw ids are of another type, or a feature is encoded in another way.
        """
        ids, bags = {"item": _matched("item", data, trained)}, {}
        known = {feature.name: feature for feature in trained.manifest.declared}
        for feature in data.manifest.declared:
            if feature.name not in known or (features is not None and feature.name not in features):
                continue
            other = known[feature.name]
            here, there = {"of": feature.of} | encoding(feature), {"of": other.of} | encoding(other)
            # The first versions did not say it of categories; their dictionaries are compared below.
            for said in (here, there) if None in (feature.type, other.type) else ():
                said.pop("type", None)
            different = [key for key in sorted(here | there) if here.get(key) != there.get(key)]
            if different:
                key = different[0]
                # These follow from the data, and no setting of `dare prepare` gives them.
                remedy = "train anew, or without the feature" if key in _OF_THE_DATA else "prepare both alike"
                raise UserError(
                    f"{data.folder}: feature {feature.name} has {key}={here.get(key)!r:.60}, and {key}="
                    f"{there.get(key)!r:.60} in {trained.folder}: its values cannot be translated; {remedy}"
                )
            if feature.encoding == "dictionary":
                ids[feature.name] = _matched(feature.name, data, trained)
        for name, of_data in data.bags(features).items():
            bags[name] = _translated(of_data, ids[name]) if name in ids else of_data
        return cls(ids, bags, trained)

    @property
    def unknown(self) -> dict[str, int]:
        """How many ids of each kind the other data set does not know."""
        return {kind: int((of_kind[1:] == 0).sum()) for kind, of_kind in self.ids.items()}

    def of(self, group: RowGroup) -> RowGroup:
        """A row group with the other data set's ids, but for items, whose features come first."""

        def translated(columns: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            return {name: self._values(name, column) for name, column in columns.items()}

        return replace(
            group,
            user_U=translated(group.user_U),
            history_M=translated(group.history_M),
            target_T=translated(group.target_T),
        )

    def of_items(self, features: ItemFeatures) -> ItemFeatures:
        """Features of this data set's items with the other one's ids."""
        return ItemFeatures({name: self._values(name, column_I) for name, column_I in features.columns_I.items()})

    def _values(self, name: str, column: NDArray[Any]) -> NDArray[Any]:
        # The number of a set stays what it is: the ids in the set are others.
        return self.ids[name][column] if name in self.ids and name != "item" and name not in self.bags else column


def _matched(kind: str, data: DataSet, trained: DataSet) -> NDArray[np.int32]:
    """For each id of one kind in ``data``, that of ``trained``; of items, the row there."""
    ids = _same_ids(kind, data, trained)
    if ids is None:
        ids = _by_raw_id(kind, data, trained)
    if kind == "item":
        place_I = trained.item_places()
        if place_I is not None:
            return place_I.take(ids)
        # Rarer items have no row.
        ids[ids > trained.manifest.largest_item] = 0
    return ids


def _same_ids(kind: str, data: DataSet, trained: DataSet) -> NDArray[np.int32] | None:
    """The ids themselves, where one data set continues the other: no raw id is read. None: it does not."""
    if not (data.continues(trained) or trained.continues(data)):
        return None
    ours, theirs = (
        each.largest_ids()["item"] if kind == "item" else each.feature(kind).rows for each in (data, trained)
    )
    ids = np.arange(ours + 1, dtype=np.int32)
    ids[theirs + 1 :] = 0
    return ids


def _by_raw_id(kind: str, data: DataSet, trained: DataSet) -> NDArray[np.int32]:
    ours, theirs = data.names(kind), trained.names(kind)
    if kind == "item" and ours.null_count == len(ours) > 1 and theirs.null_count == len(theirs):
        # Hashed items have no raw ids.
        if len(ours) != len(theirs):
            raise UserError(
                f"{data.folder}: items.hash_buckets is {len(ours) - 1}, and {len(theirs) - 1} in {trained.folder}; "
                "prepare both alike"
            )
        return np.arange(len(ours), dtype=np.int32)
    if ours.type != theirs.type:
        raise UserError(
            f"{data.folder}: raw values of {kind} are {ours.type}, those of {trained.folder} are {theirs.type}; "
            "prepare both from logs of one kind"
        )
    # The place of a raw value is its id. Null has the place 0, which is what an id without a raw value becomes.
    ids: NDArray[np.int32] = pc.fill_null(pc.index_in(ours, theirs), 0).to_numpy().astype(np.int32)
    return ids


def _translated(bags: Bags, ids: NDArray[np.int32]) -> Bags:
    """Sets with other ids, ascending within each; what is unknown is left out, as it is where a set is written."""
    id_E = ids[bags.id_E.numpy()]
    bag_E = np.repeat(np.arange(len(bags)), np.diff(bags.offset_B1.numpy()))
    bag_E, id_E = bag_E[id_E > 0], id_E[id_E > 0]
    order_E = np.lexsort((id_E, bag_E))
    offset_B1 = np.concatenate([[0], np.cumsum(np.bincount(bag_E, minlength=len(bags)))])
    return Bags(torch.from_numpy(offset_B1), torch.from_numpy(id_E[order_E]))
