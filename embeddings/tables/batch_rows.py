"""The differentiable lookups of a batch: rows that come to this rank, and histories that are pooled on the shards.

T = targets, K = behaviours selected of each, M = behaviours of all users, D = dim of the inherent features together,
d = dim of a table, L = rows of a lookup.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import embedding

from embeddings.batch import Batch, Selection, gather_or_zeros
from embeddings.features import Rows, selected_rows, target_rows
from embeddings.layers.pooling import Representation, weighted_sum
from embeddings.tables.collections import AllCrossRows, CrossRows, Tables
from schemas.model import Feature


class LookedUp(NamedTuple):
    """Some rows of a table, as they were looked up."""

    table: str
    """Its name."""
    rows: Tensor
    """float32 (L, d)."""
    id_L: Tensor | None
    """The ids of the rows, int32 (L,); None: these are all rows of the table, in order."""


class BatchRows:
    """One lookup of a batch: of its targets, and of either the selected behaviours or all of them.

    Args:
        batch: the targets and their histories.
        tables: where the rows are.
        cross: all rows of the cross tables.
        target_sets: the sets of tables that targets are looked up in.
        history_sets: the sets that behaviours are looked up in.
        selected: the behaviours of each sequence.
        looks_up_all: look up every behaviour once, so that any selection can be taken from them; else those selected.
    """

    def __init__(
        self,
        batch: Batch,
        tables: Tables,
        cross: AllCrossRows,
        target_sets: set[str],
        history_sets: set[str],
        selected: Mapping[str, Selection],
        looks_up_all: bool,
    ) -> None:
        self._batch, self._tables, self._cross = batch, tables, cross
        self._selected = None if looks_up_all else selected
        # Sorted here and below: a set of strings has another order in each process, and every lookup is a collective,
        # which ranks must enter in the same order.
        self._dims = {name: tables.inherent_dims(name) for name in sorted(target_sets | history_sets)}
        self._targets: dict[str, Tensor] = {}
        self._behaviors: dict[str, dict[str, Tensor]] = {}
        self._ids: dict[tuple[str, str | None], dict[Feature, Tensor]] = {}
        """The ids that were looked up: by set and sequence, where None stands for the targets."""
        self._last_rows: dict[tuple[str, str], tuple[Selection, Rows]] = {}
        """By set and sequence: the selection that `behaviors` was last called with, and the rows that it returned."""
        histories = {name: batch.histories[name] for name in selected}
        # What to look up of the behaviours, sequence by sequence: all of them, or the T x K that were selected.
        item, category, valid = [], [], []
        for name, history in histories.items():
            chosen = selected[name]
            item.append(history.item_M if looks_up_all else gather_or_zeros(history.item_M, chosen.index_TK).flatten())
            category.append(
                history.category_M if looks_up_all else gather_or_zeros(history.category_M, chosen.index_TK).flatten()
            )
            valid.append(torch.ones_like(item[-1], dtype=torch.bool) if looks_up_all else chosen.valid_TK.flatten())
        counts = [len(ids) for ids in item]
        # One lookup for each set of tables, of behaviours and targets together: a rank waits for the others once, and a
        # row that is needed twice travels once. A list times a bool is the list, or nothing.
        all_targets = torch.ones_like(batch.item_T, dtype=torch.bool)
        for name in sorted(target_sets | history_sets):
            has_history, has_target = name in history_sets, name in target_sets
            # A list times False is empty: a set that serves targets alone looks up no behaviours, and vice versa.
            ids: dict[Feature, Tensor] = {
                "item": torch.cat([*item * has_history, *[batch.item_T] * has_target]),
                "category": torch.cat([*category * has_history, *[batch.category_T] * has_target]),
            }
            valid_L = torch.cat([*valid * has_history, *[all_targets] * has_target])
            parts = tables.inherent_rows(name, ids, valid_L).split(counts * has_history + [len(batch)] * has_target)
            # The targets were put last.
            if has_target:
                self._targets[name] = parts[-1]
                self._ids[name, None] = {"item": batch.item_T, "category": batch.category_T}
            if has_history:
                # Not strict: the targets' part may follow.
                self._behaviors[name] = dict(zip(histories, parts, strict=False))
                for sequence, item_L, category_L in zip(histories, item, category, strict=True):
                    self._ids[name, sequence] = {"item": item_L, "category": category_L}

    def targets(self, name: str, sequence: str) -> Rows:
        """Rows (T, ...) of the targets in set ``name``, seen from a sequence."""
        return Rows(self._targets[name], target_rows(self._batch, self._cross[name][sequence]))

    def behaviors(self, name: str, sequence: str, selected: Selection) -> Rows:
        """Rows (T, K, ...) of the selected behaviours in set ``name``.

        Without ``looks_up_all``, the selection must be the one that was looked up.
        """
        # Attention and representation often share tables. Both then use the same tensor, so that autograd adds their
        # gradients before they travel back.
        last = self._last_rows.get((name, sequence))
        if last is not None and last[0] is selected:
            return last[1]
        rows = self._behaviors[name][sequence]
        if self._selected is None:
            # On a rank without behaviours, the sum of no rows is a row of zeros that still belongs to the graph. The
            # backward pass of `embedding` adds up in a fixed order, on a GPU too. Padding takes index 0; its gradient
            # is zero, because its weight is.
            inherent = embedding(selected.index_TK, rows if len(rows) else rows.sum(0, keepdim=True))
        else:
            assert selected is self._selected[sequence], "rows of another selection"
            inherent = rows.view(*selected.index_TK.shape, rows.shape[1])
        history = self._batch.histories[sequence]
        taken = Rows(inherent, selected_rows(self._batch, history, selected, self._cross[name][sequence]))
        self._last_rows[name, sequence] = selected, taken
        return taken

    def parts(self) -> list[LookedUp]:
        """All that was looked up, table by table: rows of ids first, then all rows of small tables."""
        looked_up: list[LookedUp] = []
        # The tables of a set came side by side; here each has its own columns again, with its name and its ids.
        for name, sequence, rows_LD in self._inherent():
            columns = rows_LD.split(list(self._dims[name].values()), dim=1)
            for feature, rows_Ld in zip(self._dims[name], columns, strict=True):
                table, id_L = self._tables.spec(name, feature).name, self._ids[name, sequence][feature]
                looked_up.append(LookedUp(table, rows_Ld, id_L))
        for name in self._dims:
            for sequence, by_feature in self._cross[name].items():
                looked_up += [
                    LookedUp(self._tables.spec(name, feature, sequence).name, rows_Rd, None)
                    for feature, rows_Rd in by_feature.items()
                ]
        return looked_up

    def replaced(self, rows: Sequence[Tensor]) -> Self:
        """The lookup with other rows in the place of those that `parts` returns, in their order."""
        # The order is that of `parts`: inherent rows by use, then cross rows by set, sequence and feature.
        other, rest = copy(self), iter(rows)
        other._last_rows = {}
        joined = iter([torch.cat([next(rest) for _ in self._dims[name]], dim=1) for name, _, _ in self._inherent()])
        other._targets = {name: next(joined) for name in self._targets}
        other._behaviors = {
            name: {sequence: next(joined) for sequence in by_sequence} for name, by_sequence in self._behaviors.items()
        }
        other._cross = {
            name: {
                sequence: {feature: next(rest) for feature in by_feature}
                for sequence, by_feature in self._cross[name].items()
            }
            for name in self._dims
        }
        return other

    def _inherent(self) -> list[tuple[str, str | None, Tensor]]:
        """The rows of the inherent features, by set and sequence, where None stands for the targets."""
        by_use: list[tuple[str, str | None, Tensor]] = [(name, None, rows) for name, rows in self._targets.items()]
        for name, by_sequence in self._behaviors.items():
            by_use += [(name, sequence, rows) for sequence, rows in by_sequence.items()]
        return by_use


def pooled_on_shards(
    batch: Batch,
    tables: Tables,
    name: str,
    cross: CrossRows,
    selected: Mapping[str, Selection],
    weights: Mapping[str, Tensor],
) -> dict[str, Representation]:
    """Targets and pooled histories in representation's tables: one bag for each target and one for each history.

    Targets and histories share the lookup, so that the tables' optimizers see one gradient of each row a step.

    Args:
        batch: the targets and their histories.
        tables: where the rows are.
        name: the set of tables, sharded row-wise.
        cross: all rows of its cross tables.
        selected: the behaviours of each sequence.
        weights: float32 (T, K) for each sequence, with gradient; 0 where there is no behaviour.

    Returns:
        The representation of targets and histories, for each sequence.
    """
    # First the targets, each a bag of one with weight 1, then for each sequence a bag for each target.
    item, category = [batch.item_T], [batch.category_T]
    weight, length = [torch.ones(len(batch), device=batch.item_T.device)], [torch.ones_like(batch.item_T)]
    for sequence, chosen in selected.items():
        history = batch.histories[sequence]
        # Padding is left out of the bags, so an empty history is an empty bag, and its sum is 0.
        item.append(gather_or_zeros(history.item_M, chosen.index_TK)[chosen.valid_TK])
        category.append(gather_or_zeros(history.category_M, chosen.index_TK)[chosen.valid_TK])
        weight.append(weights[sequence][chosen.valid_TK])
        length.append(chosen.valid_TK.sum(1))
    ids: dict[Feature, Tensor] = {"item": torch.cat(item), "category": torch.cat(category)}
    target_TD, *pooled = tables.pooled_rows(name, ids, torch.cat(weight), torch.cat(length)).split(
        [len(batch)] * len(length)
    )
    histories = {}
    for (sequence, chosen), pooled_TD in zip(selected.items(), pooled, strict=True):
        # Rows of cross features are on this rank anyway, so they are pooled here.
        rows = selected_rows(batch, batch.histories[sequence], chosen, cross[sequence])
        pooled_cross = {feature: weighted_sum(weights[sequence], rows_TKd) for feature, rows_TKd in rows.items()}
        histories[sequence] = Representation(
            Rows(target_TD, target_rows(batch, cross[sequence])), Rows(pooled_TD, pooled_cross)
        )
    return histories
