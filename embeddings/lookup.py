"""One differentiable lookup of targets and chosen behaviours in each set of tables.

T = targets, K = behaviours chosen of each, M = behaviours of all users, D = dim of the inherent features together,
L = bags.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from embeddings.batch import Batch
from embeddings.cross_features import selected_rows, target_rows
from embeddings.rows import Rows
from embeddings.search.selection import Selection, taken
from embeddings.tables import AllCrossRows, Tables
from schemas.model import Feature


class BatchRows:
    """Rows of a batch: of the targets, and of either the selected behaviours or all of them.

    Args:
        batch: the targets and their histories.
        tables: where the rows are.
        cross: all rows of the cross tables.
        target_sets: the sets of tables that targets are looked up in.
        history_sets: the sets that behaviours are looked up in.
        selected: by sequence, the behaviours.
        whole: look up all behaviours, once each, so that any selection can be taken from them.
        bags: at least the number of rows, and the same on all ranks.
    """

    def __init__(
        self,
        batch: Batch,
        tables: Tables,
        cross: AllCrossRows,
        target_sets: set[str],
        history_sets: set[str],
        selected: Mapping[str, Selection],
        whole: bool,
        bags: int,
    ) -> None:
        self._batch, self._cross, self._whole = batch, cross, whole
        self._targets: dict[str, Tensor] = {}
        self._behaviors: dict[str, dict[str, Tensor]] = {}
        histories = {name: batch.histories[name] for name in selected}
        item, category, valid = [], [], []
        for name, history in histories.items():
            chosen = selected[name]
            item.append(history.item_M if whole else taken(history.item_M, chosen.behavior_TK).flatten())
            category.append(history.category_M if whole else taken(history.category_M, chosen.behavior_TK).flatten())
            valid.append(torch.ones_like(item[-1], dtype=torch.bool) if whole else chosen.valid_TK.flatten())
        counts = [len(ids) for ids in item]
        all_targets = torch.ones_like(batch.item_T, dtype=torch.bool)
        for name in sorted(target_sets | history_sets):
            of_history, of_target = name in history_sets, name in target_sets
            ids: dict[Feature, Tensor] = {
                "item": torch.cat([*item * of_history, *[batch.item_T] * of_target]),
                "category": torch.cat([*category * of_history, *[batch.category_T] * of_target]),
            }
            valid_L = torch.cat([*valid * of_history, *[all_targets] * of_target])
            parts = tables.inherent_rows(name, ids, valid_L, bags).split(counts * of_history + [len(batch)] * of_target)
            if of_target:
                self._targets[name] = parts[-1]
            if of_history:
                self._behaviors[name] = dict(zip(histories, parts, strict=False))

    def targets(self, name: str, sequence: str) -> Rows:
        """Rows (T, ...) of the targets in set ``name``, seen from a sequence."""
        return Rows(self._targets[name], target_rows(self._batch, self._cross[name][sequence]))

    def behaviors(self, name: str, sequence: str, selected: Selection) -> Rows:
        """Rows (T, K, ...) of selected behaviours in set ``name``; without ``whole``, of the selection looked up."""
        rows = self._behaviors[name][sequence]
        if self._whole:
            # The sum of no rows is a row of zeros that still belongs to the graph, on a rank without behaviours.
            inherent = taken(rows if len(rows) else rows.sum(0, keepdim=True), selected.behavior_TK)
        else:
            inherent = rows.view(*selected.behavior_TK.shape, rows.shape[1])
        history = self._batch.histories[sequence]
        return Rows(inherent, selected_rows(self._batch, history, selected, self._cross[name][sequence]))
