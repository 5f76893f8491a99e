"""The differentiable lookups of a batch: rows that come to this rank, and histories that are pooled on the shards.

T = targets, K = behaviours selected of each, M = behaviours of all users, D = dim of the inherent features together,
d = dim of a table, L = rows of a lookup.
"""

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import embedding
from torch.profiler import record_function

from embeddings.batch import Batch, Branch, Selection, gather_or_zeros
from embeddings.distributed.lookups import RowsOfIds, WeightedBags
from embeddings.features import IndexedBehaviors, IndexedRows, Rows, selected_rows, target_rows
from embeddings.layers import row_products
from embeddings.layers.pooling import Representation
from embeddings.tables.collections import SmallRows, Tables
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
        small: all rows of the small tables.
        target_sets: the sets of tables that targets are looked up in.
        history_sets: the sets that behaviours are looked up in.
        branches: the behaviours that were selected; several branches may be of one sequence.
        looks_up_all: look up every behaviour once, so that any selection can be taken from them; else those selected.
    """

    def __init__(
        self,
        batch: Batch,
        tables: Tables,
        small: SmallRows,
        target_sets: set[str],
        history_sets: set[str],
        branches: Sequence[Branch],
        looks_up_all: bool,
    ) -> None:
        self._batch, self._tables, self._cross = batch, tables, small.cross
        # All behaviours of a sequence, or the selections themselves, in the order in which they were looked up.
        sequences = list(dict.fromkeys(branch.sequence for branch in branches))
        self._numbers = {sequence: number for number, sequence in enumerate(sequences)}
        self._selected = None if looks_up_all else [branch.chosen for branch in branches]
        self._rows: dict[str, dict[Feature, RowsOfIds]] = {}
        """By set: what was looked up, behaviours of one sequence or branch after the other's, and targets at last."""
        self._counts: list[int] = []
        """How many behaviours of each were looked up."""
        self._cut: dict[tuple[str, Feature], Sequence[Tensor]] = {}
        """By set and feature: rows that came in the order of their ids, cut into those of each sequence and targets."""
        self._pooled: dict[tuple[str, Feature], RowsOfIds] = {}
        """By set and feature: what was looked up, of features with several values the means of their bags."""
        self._taken: dict[tuple[str, int], tuple[Selection, IndexedBehaviors]] = {}
        """By set and selection: what `_behaviors` has returned. The selection stays, so that no other has its id."""
        # What to look up of the behaviours, sequence by sequence: all of them, or the T x K that were selected.
        of_behaviors: dict[Feature, list[Tensor]] = {feature: [] for feature in tables.sides.inherent}
        valid = list[Tensor]()
        for name, chosen in [(sequence, None) for sequence in sequences] if looks_up_all else branches:
            for feature, parts in of_behaviors.items():
                column_M = batch.histories[name].column(feature)
                parts.append(column_M if chosen is None else gather_or_zeros(column_M, chosen.index_TK).flatten())
            valid += [] if chosen is None else [chosen.valid_TK.flatten()]
            self._counts.append(len(of_behaviors["item"][-1]))
        self._history_sets, self._target_sets = history_sets, target_sets
        targets = torch.ones_like(batch.item_T, dtype=torch.bool)
        # One lookup for each set of tables, of behaviours and targets together: a rank waits for the others once, and a
        # row that is needed twice travels once. Sorted: a set of strings has another order in each process, and every
        # lookup is a collective, which ranks must enter in the same order.
        for name in sorted(target_sets | history_sets):
            has_history, has_target = name in history_sets, name in target_sets
            # A list times False is empty: a set that serves targets alone looks up no behaviours, and vice versa.
            ids: dict[Feature, Tensor] = {
                feature: torch.cat([*of_behaviors[feature] * has_history, *[batch.column(feature)] * has_target])
                for feature in tables.inherent_features(name)
            }
            valid_B = torch.cat([*valid, *[targets] * has_target]) if valid and has_history else None
            self._rows[name] = tables.inherent_rows(name, ids, valid_B, small, batch.bags)

    def targets(self, name: str, sequence: str, scored: bool = False) -> Rows:
        """Rows (T, ...) of the targets in set ``name``, seen from a sequence; ``scored``: of scored features alone."""
        features = self._tables.inherent_features(name, scored)
        parts = [self._part(name, feature, None).gathered() for feature in features]
        inherent = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        sides, wanted = self._tables.sides, self._tables.cross_features(name, scored)
        cross = {feature: self._cross[name][sequence][feature] for feature in wanted}
        return Rows(inherent, target_rows(self._batch, cross, sides.carried, sides.bags))

    def behaviors(self, name: str, sequence: str, selected: Selection, scored: bool = False) -> Rows:
        """Rows (T, K, ...) of the selected behaviours in set ``name``; ``scored``: of scored features alone.

        Without ``looks_up_all``, the selection must be the one that was looked up.
        """
        taken = self._behaviors(name, sequence, selected)
        wanted = {*self._tables.inherent_features(name, scored), *self._tables.cross_features(name, scored)}
        return taken if wanted == taken.features.keys() else taken.only(wanted)

    def _behaviors(self, name: str, sequence: str, selected: Selection) -> IndexedBehaviors:
        # Attention and representation often share tables. Both then use the same tensor, so that autograd adds their
        # gradients before they travel back.
        taken = self._taken.get((name, id(selected)))
        if taken is not None:
            return taken[1]
        history = self._batch.histories[sequence]
        number = self._numbers[sequence]
        if self._selected is not None:
            number = next(number for number, each in enumerate(self._selected) if each is selected)
        inherent: dict[Feature, IndexedRows] = {}
        for feature in self._rows[name]:
            part = self._part(name, feature, number)
            if self._selected is None:
                # Padding takes index 0; its gradient is zero, because its weight is.
                index_TK = gather_or_zeros(part.index_X, selected.index_TK)
                inherent[feature] = IndexedRows(part.rows_Ld, index_TK)
            else:
                inherent[feature] = part._replace(index_X=part.index_X.view_as(selected.index_TK))
        cross = selected_rows(self._batch, history, selected, self._cross[name][sequence], self._tables.sides.bags)
        behaviors = IndexedBehaviors(inherent, cross)
        self._taken[name, id(selected)] = selected, behaviors
        return behaviors

    def _part(self, name: str, feature: Feature, number: int | None) -> IndexedRows:
        """The rows of some behaviours, by their number, or of the targets (None), as they were looked up."""
        if (name, feature) not in self._pooled:
            self._pooled[name, feature] = self._rows[name][feature].pooled()
        rows = self._pooled[name, feature]
        counts = [*self._counts] if name in self._history_sets else []
        counts += [len(self._batch)] if name in self._target_sets else []
        number = len(counts) - 1 if number is None else number
        if not rows.in_order:
            first = sum(counts[:number])
            return IndexedRows(rows.rows_Ld, rows.index_B[first : first + counts[number]])
        # Cut once: so the gradients of the parts are laid side by side, where slices would each be filled up with
        # zeros and then added.
        if (name, feature) not in self._cut:
            self._cut[name, feature] = rows.rows_Ld.split(counts)
        cut = self._cut[name, feature][number]
        if not len(cut):
            # Of no rows a row of zeros is left, which padding may name.
            return IndexedRows(cut.sum(0, keepdim=True), rows.index_B[:0])
        return IndexedRows(cut, rows.index_B[: len(cut)], in_order=True)

    def parts(self) -> list[LookedUp]:
        """All that was looked up, table by table: rows of ids first, then all rows of the cross features' tables."""
        looked_up = [
            LookedUp(self._tables.spec(name, feature).name, rows.rows_Ld, rows.id_L)
            for name, by_feature in self._rows.items()
            for feature, rows in by_feature.items()
        ]
        for name in self._rows:
            for sequence, cross in self._cross[name].items():
                looked_up += [
                    LookedUp(self._tables.spec(name, feature, sequence).name, rows_Rd, None)
                    for feature, rows_Rd in cross.items()
                ]
        return looked_up

    def replaced(self, rows: Sequence[Tensor]) -> Self:
        """The lookup with other rows in the place of those that `parts` returns, in their order."""
        other, rest = copy(self), iter(rows)
        other._taken, other._cut, other._pooled = {}, {}, {}
        other._rows = {
            name: {feature: of_ids._replace(rows_Ld=next(rest)) for feature, of_ids in by_feature.items()}
            for name, by_feature in self._rows.items()
        }
        other._cross = {
            name: {
                sequence: {feature: next(rest) for feature in by_feature}
                for sequence, by_feature in self._cross[name].items()
            }
            for name in self._rows
        }
        return other


@record_function("dare/lookups")
def pooled_on_shards(
    batch: Batch,
    tables: Tables,
    name: str,
    small: SmallRows,
    branches: Sequence[Branch],
    weights: Sequence[Tensor],
) -> list[Representation]:
    """Targets and pooled histories in representation's tables: one bag for each target and one for each history.

    Targets and histories share the lookup, so that the tables' optimizers see one gradient of each row a step.

    Args:
        batch: the targets and their histories.
        tables: where the rows are.
        name: the set of tables, sharded row-wise.
        small: all rows of the small tables.
        branches: the behaviours that were selected.
        weights: float32 (T, K) for each branch, with gradient; 0 where there is no behaviour.

    Returns:
        The representation of targets and histories, for each branch.
    """
    count, device = len(batch), batch.item_T.device
    target_T = torch.arange(count, device=device)
    # First the targets, each a bag of one with weight 1, then for each sequence a bag for each target. Padding is left
    # out of the bags, so an empty history is an empty bag, and its sum is 0.
    inherent, sides = tables.inherent_features(name), tables.sides
    ids: dict[Feature, list[Tensor]] = {feature: [batch.column(feature)] for feature in inherent}
    weight, valid = [torch.ones(count, device=device)], [torch.ones_like(batch.item_T, dtype=torch.bool)]
    bag = [target_T]
    for number, ((sequence, chosen), weight_TK) in enumerate(zip(branches, weights, strict=True)):
        history = batch.histories[sequence]
        for feature in inherent:
            ids[feature].append(gather_or_zeros(history.column(feature), chosen.index_TK).flatten())
        weight.append(weight_TK.flatten())
        valid.append(chosen.valid_TK.flatten())
        bag.append((target_T + count * (number + 1))[:, None].expand_as(chosen.index_TK).flatten())
    # Rows of small tables are on this rank anyway, and those of bags are means that many behaviours share: these are
    # pooled here.
    here = [feature for feature in inherent if feature in small.inherent[name] or feature in sides.bags]
    elsewhere = {feature: torch.cat(ids[feature]) for feature in inherent if feature not in here}
    bags = WeightedBags(elsewhere, torch.cat(weight), torch.cat(valid), torch.cat(bag), count * len(bag))
    sums = {feature: sum_Bd.split([count] * len(bag)) for feature, sum_Bd in tables.pooled_rows(name, bags).items()}
    wanted = {feature: torch.cat(ids[feature]) for feature in here}
    for feature, of in tables.inherent_rows(name, wanted, torch.cat(valid), small, batch.bags).items():
        rows_Ld, index_B, *_ = of.pooled()
        index_T, *of_histories = index_B.split([len(id_E) for id_E in ids[feature]])
        pooled = [
            row_products.weighted_sum(weight_TK, rows_Ld, index_E.view_as(weight_TK))
            for index_E, weight_TK in zip(of_histories, weights, strict=True)
        ]
        sums[feature] = (embedding(index_T, rows_Ld), *pooled)
    target_TD, *pooled_TD = (
        torch.cat(parts, dim=1) for parts in zip(*(sums[feature] for feature in inherent), strict=True)
    )
    histories = []
    for (sequence, chosen), weight_TK, history_TD in zip(branches, weights, pooled_TD, strict=True):
        cross = small.cross[name][sequence]
        rows = selected_rows(batch, batch.histories[sequence], chosen, cross, sides.bags)
        pooled_cross = {feature: row_products.weighted_sum(weight_TK, *of) for feature, of in rows.items()}
        target = Rows(target_TD, target_rows(batch, cross, sides.carried, sides.bags))
        histories.append(Representation(target, Rows(history_TD, pooled_cross)))
    return histories
