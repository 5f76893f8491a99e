"""The attention rows of all targets and behaviours of a batch, at home and without gradient, for searches made there.

M = behaviours of all users, T = targets, D = dim of the inherent features together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from embeddings.batch import Batch
from embeddings.tables import AllCrossRows, CrossRows, Tables
from schemas.model import Feature


@dataclass(frozen=True)
class AllRows:
    """What a search at home sees; each user's behaviours once, whatever the number of the user's targets."""

    batch: Batch
    target_TD: Tensor
    """float32: item and category rows of the targets."""
    behavior_MD: Mapping[str, Tensor]
    """float32, by sequence: the same of the behaviours."""
    target_cross: CrossRows
    """All rows of the targets' cross tables."""
    history_cross: CrossRows
    """All rows of the behaviours'."""

    @classmethod
    @torch.no_grad()
    def look_up(
        cls,
        batch: Batch,
        tables: Tables,
        target_set: str,
        history_set: str,
        cross: AllCrossRows,
        sequences: Sequence[str],
    ) -> Self:
        """Bring them home; every rank must call it.

        Args:
            batch: the targets and their histories.
            tables: where the rows are.
            target_set: the set of tables that targets are looked up in.
            history_set: the set that behaviours are looked up in.
            cross: by set, the rows of the cross tables.
            sequences: their names.
        """
        items = [batch.histories[name].item_M for name in sequences]
        categories = [batch.histories[name].category_M for name in sequences]

        def rows(name: str, item: list[Tensor], category: list[Tensor]) -> Tensor:
            ids: dict[Feature, Tensor] = {"item": torch.cat(item), "category": torch.cat(category)}
            return tables.inherent_rows(name, ids, torch.ones_like(ids["item"], dtype=torch.bool))

        counts = [len(item_M) for item_M in items]
        if target_set == history_set:
            together = rows(history_set, [*items, batch.item_T], [*categories, batch.category_T])
            *parts, target_TD = together.split([*counts, len(batch)])
        else:
            parts = rows(history_set, items, categories).split(counts)
            target_TD = rows(target_set, [batch.item_T], [batch.category_T])
        return cls(batch, target_TD, dict(zip(sequences, parts, strict=True)), cross[target_set], cross[history_set])
