"""Negatives of training that are drawn anew in each epoch, in the place of those that a data set has stored.

T = targets, I = items by dense id, the unknown 0 included.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.hashing import NOTHING_LEFT, draw_unowned, mix
from pipeline.stream.data_set import DataSet
from pipeline.stream.epoch_plan import Piece
from pipeline.stream.row_group import NoNegativeError, RowGroup
from schemas.errors import UserError
from schemas.manifest import REMEDY
from schemas.stream import NegativeSettings

I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Negatives:
    """Draws the negatives of an epoch.

    A draw depends on (seed, epoch, raw user id, the positive's place among the user's targets, j) alone, not on ranks,
    batches or what was read before. It is never an item of the user's: not of the whole history, before the target or
    after it, and not of a positive target.
    """

    per_positive: int
    stored: int
    """Negatives of each positive in the data set; they are left out."""
    cumulative_I: I64
    """Sum of the weights of all items up to and including this one; what has no weight is never drawn."""
    category_I: NDArray[np.int32] | None
    """Categories of items, where shards have them: in versions 1 and 2."""
    seed: int

    @classmethod
    def of(cls, settings: NegativeSettings, data_set: DataSet, seed: int) -> Self:
        """Read what can be drawn.

        Args:
            settings: how many, and how.
            data_set: whose targets must have been cut from events.
            seed: decides the draws.

        Raises:
            UserError: the targets were shown, not cut from events, or the dictionary of items cannot be read.
        """
        manifest = data_set.manifest
        if manifest.impression_files or manifest.settings.get("impressions") is not None:
            raise UserError(
                f"stream.negatives: targets of {data_set.folder} are impressions, which were shown and not drawn; "
                "leave it out, or prepare a data set of events alone"
            )
        targets, positives = manifest.counts.train.targets, manifest.counts.train.positives
        stored = max(1, targets // max(positives, 1)) - 1
        # Each positive has the same number of them, so the index of row groups tells how many positives there are.
        if positives * (1 + stored) != targets or (data_set.targets_G["train"] % (1 + stored)).any():
            raise UserError(
                f"stream.negatives: in {data_set.folder} not every positive has the same number of negatives "
                f"({targets:,} targets, {positives:,} positives); prepare it from events, or leave it out"
            )
        path = manifest.verified(data_set.folder, "items.parquet")
        former = ["category"] if manifest.schema_version < 3 else []
        try:
            table = pq.read_table(path, columns=["id", "frequency", *former])
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); {REMEDY}") from None
        id_N = table["id"].to_numpy()
        if len(id_N) and not 1 <= id_N.min() <= id_N.max() <= manifest.counts.items:
            raise UserError(f"{path}: ids are out of range; {REMEDY}")

        def by_id(column: str, kind: type) -> NDArray[Any]:
            values_I: NDArray[Any] = np.zeros(manifest.counts.items + 1, kind)
            values_I[id_N] = table[column].to_numpy()
            return values_I

        weight_I = by_id("frequency", np.int64)
        if settings.draw == "uniform":
            weight_I = np.minimum(np.arange(len(weight_I)), 1)
        # Items without a row would all be the unknown one.
        place_I = data_set.item_places()
        if place_I is None:
            weight_I[manifest.largest_item + 1 :] = 0
        else:
            weight_I[place_I == 0] = 0
        if not weight_I.any():
            raise UserError(f"stream.negatives: {data_set.folder} has no item that could be drawn; leave it out")
        category_I = by_id("category", np.int32) if former else None
        return cls(settings.per_positive, stored, np.cumsum(weight_I), category_I, seed)

    def targets(self, targets_X: I64) -> I64:
        """How many targets there are with the negatives that are drawn, where so many are stored."""
        return targets_X // (1 + self.stored) * (1 + self.per_positive)

    def columns(self, group: RowGroup, chosen_T: I64, piece: Piece, epoch: int) -> tuple[I64, dict[str, NDArray[Any]]]:
        """The targets of a piece, a positive before its negatives.

        Args:
            group: the row group.
            chosen_T: its targets that are read, stored negatives among them.
            piece: which of them, negatives counted as they are drawn.
            epoch: from 0.

        Returns:
            Which target each one is made from, and the columns in which it differs from that.

        Raises:
            UserError: positives do not have as many stored negatives as the manifest says, or a user has every item.
        """
        positive_T = chosen_T[group.target_T["label"][chosen_T] > 0]
        if len(positive_T) * (1 + self.stored) != len(chosen_T):
            raise UserError(
                f"{len(positive_T)} of {len(chosen_T)} targets are positive, "
                f"the manifest says {self.stored} negatives each"
            )
        # E = targets of the piece, D = those that are drawn.
        place_E = np.arange(piece.first, piece.last)
        index_E, number_E = positive_T[place_E // (1 + self.per_positive)], place_E % (1 + self.per_positive)
        drawn_E = number_E > 0
        columns = {name: group.target_T[name][index_E] for name in ("item", "label")}
        columns["label"][drawn_E] = 0
        columns["item"][drawn_E] = self._drawn(group, index_E[drawn_E], number_E[drawn_E], epoch)
        if self.category_I is not None and "category" in group.target_T:
            columns["category"] = self.category_I[columns["item"]]
        return index_E, columns

    def _drawn(self, group: RowGroup, index_D: I64, number_D: I64, epoch: int) -> I64:
        user_D = group.user_T[index_D]
        key_D = mix(mix(group.user_key_U[user_D], self.seed), epoch)
        key_D = mix(key_D ^ (index_D - group.target_offset_U[user_D]).astype(np.uint64), 1)
        key_D = mix(key_D ^ number_D.astype(np.uint64), 2)
        size = len(self.cumulative_I)
        kept_U = np.zeros(len(group.user_id_U), bool)
        kept_U[user_D] = True
        owned = _owned(group, kept_U, size)
        item_D = draw_unowned(key_D, user_D, owned, self.cumulative_I, 3)
        if (item_D == NOTHING_LEFT).any():
            user = int(user_D[np.argmax(item_D == NOTHING_LEFT)])
            name = group.user_id_U[user] if group.user_text_U is None else group.user_text_U[user]
            raise NoNegativeError(
                f"stream.negatives: user {name} has every item that could be drawn; leave it out, or give more data"
            )
        return item_D


def _owned(group: RowGroup, kept_U: NDArray[np.bool_], size: int) -> I64:
    """Items of some users, each once, sorted: int64, ``user * size + item``."""
    user_M = np.repeat(np.arange(len(kept_U)), np.diff(group.history_offset_U))
    positive_T = kept_U[group.user_T] & (group.target_T["label"] > 0)
    kept_M = kept_U[user_M]
    return np.unique(
        np.concatenate(
            [
                user_M[kept_M] * size + group.history_M["item"][kept_M],
                group.user_T[positive_T] * size + group.target_T["item"][positive_T],
            ]
        )
    )
