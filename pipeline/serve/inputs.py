"""The tensors that an exported model's dense program takes: their names, and how a request makes them.

T = targets, K = behaviours of a branch, U = distinct behaviours of a sequence that any target has kept, R = rows of a
small table, d = dim of one feature, n = numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, embedding_bag, pad

from embeddings.batch import Batch, Branch, gather_or_zeros
from embeddings.features import selected_rows, target_rows
from embeddings.layers.pooling import Numbers
from embeddings.sizes import FeatureSides
from embeddings.tables.specs import CONTEXT, TableRoles
from pipeline.serve.rows import StoredRows, TableKey
from schemas.model import Feature


class DenseNames:
    """Names of the tensors, by what they are."""

    NUMBERS = "numbers"
    """(T, n): those that targets have."""

    @staticmethod
    def target(of_set: str, feature: Feature, sequence: str | None = None) -> str:
        """The targets' rows (T, d); those of a cross feature as seen from a sequence."""
        return ".".join(["target", of_set, *([] if sequence is None else [sequence]), feature])

    @staticmethod
    def behaviors(of_set: str, sequence: str, feature: Feature) -> str:
        """The rows of distinct behaviours, (U, d)."""
        return f"behaviors.{of_set}.{sequence}.{feature}"

    @staticmethod
    def cross(of_set: str, branch: int, feature: Feature) -> str:
        """All rows of a cross feature's table, (R, d); with several values, the means of the bags of the branch."""
        return f"cross.{of_set}.{branch}.{feature}"

    @staticmethod
    def row(branch: int, feature: Feature) -> str:
        """Which row of a cross feature's table each behaviour of a branch has, int64 (T, K)."""
        return f"row.{branch}.{feature}"

    @staticmethod
    def of_branch(what: str, branch: int) -> str:
        """``index``: which of the U behaviours, int64 (T, K); ``valid``, bool; ``log_count``; ``numbers`` (T, K, n)."""
        return f"{what}.{branch}"

    @staticmethod
    def context(feature: Feature) -> str:
        """What is known of user or impression: rows (T, d), or a number (T, 1)."""
        return f"context.{feature}"


class UsedTables(NamedTuple):
    """The sets of tables of a model, and which features each has."""

    roles: TableRoles
    sides: FeatureSides
    sequences: tuple[str, ...]

    def inherent(self, of_set: str) -> tuple[Feature, ...]:
        """The inherent features of a set."""
        return self.sides.inherent_of(self.roles.scored_alone(of_set))

    def cross(self, of_set: str) -> tuple[Feature, ...]:
        """The cross features of a set."""
        return self.sides.cross_of(self.roles.scored_alone(of_set))

    @property
    def target_sets(self) -> list[str]:
        """The sets that targets are looked up in, sorted."""
        return sorted({self.roles.target_attention, self.roles.target_representation})

    @property
    def history_sets(self) -> list[str]:
        """The sets that behaviours are looked up in, sorted."""
        return sorted({self.roles.history_attention, self.roles.history_representation})


class RequestRows:
    """Rows of an exported model's tables, for one request after the other; many threads may use it at once.

    Args:
        used: the sets and their features.
        tables: all tables.
    """

    def __init__(self, used: UsedTables, tables: Mapping[TableKey, StoredRows]) -> None:
        self.used, self._tables = used, tables
        # Small, and asked for by each request: all of their rows, once.
        self.cross = {
            of_set: {
                sequence: {feature: tables[TableKey(of_set, feature, sequence)].all_rows() for feature in features}
                for sequence in used.sequences
            }
            for of_set in {*used.target_sets, *used.history_sets}
            for features in [used.cross(of_set)]
        }
        """By set, sequence and feature: all rows of a cross feature's table, float32 (R, d)."""

    def inherent(
        self, of_set: str, feature: Feature, column_X: Tensor, batch: Batch, *, search: bool = False
    ) -> Tensor:
        """Rows of an inherent feature, float32 (X, d); of several values, their mean.

        Args:
            of_set: the set of tables.
            feature: an inherent feature.
            column_X: ids, or numbers of bags.
            batch: which has the bags.
            search: the coarser rows that the search reads, if there are such.
        """
        table = self.table(of_set, feature, search=search)
        if feature not in self.used.sides.bags:
            return table.rows(column_X)
        distinct = batch.bags[feature].distinct(column_X)
        rows_Ed = table.rows(distinct.id_E)
        return embedding(distinct.slot_X, distinct.means(rows_Ed, torch.arange(len(rows_Ed))))

    def table(self, of_set: str, feature: Feature, *, search: bool = False) -> StoredRows:
        """The table of an inherent feature; ``search``: the copy of it that the search reads, if there is one."""
        found = self._tables.get(TableKey(of_set, feature, None, search=True)) if search else None
        return found if found is not None else self._tables[TableKey(of_set, feature, None)]

    def dense_inputs(self, batch: Batch, branches: Sequence[Branch]) -> dict[str, Tensor]:
        """The tensors of the dense program, by name."""
        return dict(
            [
                *self._of_targets(batch),
                *self._of_behaviors(batch, branches),
                *self._of_pairs(batch, branches),
                *self._context(batch),
            ]
        )

    def _of_targets(self, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        sides = self.used.sides
        for of_set in self.used.target_sets:
            for feature in self.used.inherent(of_set):
                rows_Td = self.inherent(of_set, feature, batch.column(feature), batch)
                yield DenseNames.target(of_set, feature), rows_Td
            for sequence in self.used.sequences:
                of_cross = target_rows(batch, self.cross[of_set][sequence], sides.carried, sides.bags)
                for feature, rows_Td in of_cross.items():
                    yield DenseNames.target(of_set, feature, sequence), rows_Td.contiguous()

    def _of_behaviors(self, batch: Batch, branches: Sequence[Branch]) -> Iterator[tuple[str, Tensor]]:
        """Rows of all behaviours that any branch of a sequence has kept, each once, and where branches find them."""
        for sequence in self.used.sequences:
            history = batch.histories[sequence]
            of_sequence = {
                number: branch.chosen for number, branch in enumerate(branches) if branch.sequence == sequence
            }
            # A flag for each behaviour, rather than `unique`, which would sort them. Padding names behaviour 0: it has
            # a row even in an empty history.
            kept_M = torch.zeros(max(1, len(history.item_M)), dtype=torch.bool)
            for chosen in of_sequence.values():
                kept_M[chosen.index_TK.flatten()] = True
            kept_M[0] = True
            behavior_U, slot_M = kept_M.nonzero().flatten(), kept_M.cumsum(0) - 1
            for number, chosen in of_sequence.items():
                yield DenseNames.of_branch("index", number), slot_M[chosen.index_TK]
            for feature in self.used.sides.inherent:
                column_U = gather_or_zeros(history.column(feature), behavior_U)
                for of_set in self.used.history_sets:
                    if feature in self.used.inherent(of_set):
                        rows_Ud = self.inherent(of_set, feature, column_U, batch)
                        yield DenseNames.behaviors(of_set, sequence, feature), rows_Ud

    def _of_pairs(self, batch: Batch, branches: Sequence[Branch]) -> Iterator[tuple[str, Tensor]]:
        """What depends on target and behaviour."""
        sides = self.used.sides
        for number, (sequence, chosen) in enumerate(branches):
            yield DenseNames.of_branch("valid", number), chosen.valid_TK
            if chosen.log_count_TK is not None:
                yield DenseNames.of_branch("log_count", number), chosen.log_count_TK
            for of_set in self.used.history_sets:
                tables = self.cross[of_set][sequence]
                of_cross = selected_rows(batch, batch.histories[sequence], chosen, tables, sides.bags)
                for feature, (rows_Rd, row_TK, _) in of_cross.items():
                    yield DenseNames.row(number, feature), row_TK
                    yield DenseNames.cross(of_set, number, feature), rows_Rd
        numbers = Numbers.of(batch, branches, sides)
        for own_Tn in numbers.of_targets:
            yield DenseNames.NUMBERS, own_Tn
        for number, number_TKn in enumerate(numbers.of_behaviors):
            yield DenseNames.of_branch("numbers", number), number_TKn

    def _context(self, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        sides = self.used.sides
        for feature in (*sides.context, *sides.context_numbers):
            of_users = feature in sides.of_users
            column_X = batch.features_U[feature] if of_users else batch.features_T[feature]
            if feature in sides.context_numbers:
                rows_Xd = column_X[:, None]
            elif feature in sides.bags:
                length_X, id_E = batch.bags[feature].each(column_X)
                rows_Ed = self._tables[TableKey(CONTEXT, feature, None)].rows(id_E)
                rows_Xd = embedding_bag(
                    torch.arange(len(id_E)), rows_Ed, pad(length_X.cumsum(0), (1, 0)), mode="mean",
                    include_last_offset=True,
                )  # fmt: skip
            else:
                rows_Xd = self._tables[TableKey(CONTEXT, feature, None)].rows(column_X)
            yield DenseNames.context(feature), rows_Xd[batch.user_T] if of_users else rows_Xd
