"""Features: rows of inherent ones, and which rows of the small cross tables a target and a behaviour have.

Inherent features (item, and what belongs to items) are a target's or a behaviour's alone. Cross features (position,
interval) depend on both, or (what belongs to behaviours) have small tables that are treated alike.

T = targets, K = behaviours selected of each, M = behaviours of all users, X = any shape of (target, behaviour) pairs,
D = dim of the inherent features together, d = dim of one feature, R = rows of its table, L = rows looked up, E = dim of
all features together.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding

from embeddings.batch import Bags, Batch, History, Selection, gather_or_zeros
from embeddings.intervals import interval_bucket
from schemas.model import Feature

Role = Literal["attention", "representation"]
"""What rows are used for: to score and weight behaviours, or to be pooled and predicted from."""


class Rows:
    """Embedding rows of targets (T, ...) or of behaviours (T, K, ...) in one set of tables.

    Args:
        inherent: float32 (..., D): those of the inherent features, concatenated.
        cross: float32 (..., d) each.
    """

    def __init__(self, inherent: Tensor, cross: Mapping[Feature, Tensor]) -> None:
        self._inherent, self._cross = inherent, cross

    @property
    def inherent(self) -> Tensor:
        """float32 (..., D): those of the inherent features, concatenated."""
        return self._inherent

    @property
    def cross(self) -> Mapping[Feature, Tensor]:
        """float32 (..., d) each."""
        return self._cross

    def parts(self) -> list[Tensor]:
        """The inherent features' rows, then those of each cross feature."""
        return [self.inherent, *self.cross.values()]

    def by_feature(self, dims: Mapping[Feature, int]) -> dict[Feature, Tensor]:
        """Each feature's rows, those of the inherent ones cut apart; ``dims`` has their dims, in their order."""
        return dict(zip(dims, self.inherent.split(list(dims.values()), dim=-1), strict=True)) | dict(self.cross)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Rows":
        """Apply ``function`` to each part."""
        return Rows(function(self.inherent), {feature: function(rows) for feature, rows in self.cross.items()})

    def concatenated(self) -> Tensor:
        """All features side by side, (..., E)."""
        return torch.cat(self.parts(), dim=-1) if self.cross else self.inherent


class IndexedRows(NamedTuple):
    """Rows of one feature that are named by an index, and not copied."""

    rows_Ld: Tensor
    """float32; at least one row."""
    index_X: Tensor
    """int64, 0 .. L - 1."""
    in_order: bool = False
    """Whether the index names each row once, in order."""

    def gathered(self) -> Tensor:
        """The rows themselves, (X, d)."""
        if self.in_order:
            return self.rows_Ld.view(*self.index_X.shape, -1)
        # The backward pass of `embedding` adds up in a fixed order, on a GPU too.
        return embedding(self.index_X, self.rows_Ld)


class IndexedBehaviors(Rows):
    """Embedding rows of selected behaviours (T, K, ...), which are gathered only if someone wants them as they are.

    Products with queries and weighted sums do not (`embeddings.layers.row_products`).

    Args:
        inherent: the rows of each inherent feature; index (T, K).
        cross: those of each cross feature.
    """

    def __init__(self, inherent: Mapping[Feature, IndexedRows], cross: Mapping[Feature, IndexedRows]) -> None:
        self.inherent_features, self.cross_features = inherent, cross

    @property
    def features(self) -> dict[Feature, IndexedRows]:
        """The rows of each feature, the inherent ones first."""
        return {**self.inherent_features, **self.cross_features}

    @cached_property
    def _inherent(self) -> Tensor:  # type: ignore[override]
        parts = [rows.gathered() for rows in self.inherent_features.values()]
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    @cached_property
    def _cross(self) -> Mapping[Feature, Tensor]:  # type: ignore[override]
        return {feature: rows.gathered() for feature, rows in self.cross_features.items()}

    def only(self, features: Collection[Feature]) -> "IndexedBehaviors":
        """The rows of some features."""
        parts = (
            {f: rows for f, rows in of.items() if f in features} for of in (self.inherent_features, self.cross_features)
        )
        return IndexedBehaviors(*parts)


class RowSource(Protocol):
    """Rows of targets and behaviours, by whoever has looked them up."""

    def targets(self, name: str, sequence: str, scored: bool = False) -> Rows:
        """Rows (T, ...) of the targets in set ``name``, seen from a sequence; ``scored``: of scored features alone."""

    def behaviors(self, name: str, sequence: str, selected: Selection, scored: bool = False) -> Rows:
        """Rows (T, K, ...) of selected behaviours in set ``name``; ``scored``: of scored features alone."""


class RowHook(Protocol):
    """Watches how rows are used, and the gradients that come back to them. It must not change any of it."""

    def __call__(
        self,
        role: Role,
        rows: Sequence[Rows],
        function: Callable[[Sequence[Rows]], Tensor],
        output: Tensor,
        weights: Sequence[Tensor | None],
    ) -> None:
        """Called in training, once ``output = function(rows)`` is made.

        Args:
            role: what the rows are used for.
            rows: of targets (T, ...) or behaviours (T, K, ...).
            function: what the model makes of them; it may be called again with other rows of the same shapes.
            output: what it has made, in the graph of this step.
            weights: for each of ``rows``: None for rows as they are; (T, K) for sums ``sum_k w_tk e_k`` that were made
                elsewhere, so that the gradient of row ``e_k`` is ``w_tk`` times that of the sum.
        """


TARGET_ROW = 0
"""The target's row of cross features that it has no value of its own of; a behaviour has it only where its value is
unknown (0)."""


def pooled_bags(bags: Bags, number_X: Tensor, rows_Rd: Tensor) -> IndexedRows:
    """Rows of a feature with several values: the mean of each bag's rows, made once for each different bag.

    Args:
        bags: of the data set.
        number_X: integer, numbers of bags.
        rows_Rd: all rows of the feature's table.
    """
    distinct = bags.distinct(number_X)
    return IndexedRows(distinct.means(rows_Rd, distinct.id_E), distinct.slot_X)


def behavior_row(feature: Feature, batch: Batch, history: History, index_X: Tensor, target_X: Tensor) -> Tensor:
    """Which row of a cross feature's table each behaviour has, seen from a target.

    Args:
        feature: a cross feature.
        batch: the targets.
        history: the behaviours.
        index_X: int64, which of the M behaviours.
        target_X: int64, which of the T targets; broadcasts against ``index_X``.

    Returns:
        int32 or int64 (X).

    """
    if feature == "position":
        # Counted back from the target: 1 is the latest behaviour of its window. At most N, as a window is no longer, so
        # the table needs N + 1 rows. For padding it means nothing; callers mask it.
        return history.end_T[target_X] - index_X
    if feature == "interval":
        return interval_bucket(batch.timestamp_T[target_X] - gather_or_zeros(history.timestamp_M, index_X))
    return gather_or_zeros(history.features_M[feature], index_X)


def target_row(feature: Feature, batch: Batch, carried: Collection[Feature]) -> Tensor | None:
    """Which row of a cross feature's table each target has, int32 (T,); None: ``TARGET_ROW`` for all.

    Args:
        feature: a cross feature.
        batch: the targets.
        carried: the features that targets have values of their own of.
    """
    return batch.features_T[feature] if feature in carried else None


def target_rows(
    batch: Batch, tables: Mapping[Feature, Tensor], carried: Collection[Feature], of_bags: Collection[Feature]
) -> dict[Feature, Tensor]:
    """Embedding rows of the targets, (T, d) for each cross feature.

    Args:
        batch: the targets.
        tables: by cross feature, all rows of its table.
        carried: the features that targets have values of their own of.
        of_bags: the features with several values.
    """
    rows: dict[Feature, Tensor] = {}
    for feature, rows_Rd in tables.items():
        row_T = target_row(feature, batch, carried)
        if row_T is None:
            # The empty bag has no row. `expand` copies nothing, and its backward pass adds up the gradients of all
            # targets into the one row.
            row_d = rows_Rd.new_zeros(rows_Rd.shape[1]) if feature in of_bags else rows_Rd[TARGET_ROW]
            rows[feature] = row_d.expand(len(batch), -1)
        elif feature in of_bags:
            rows[feature] = pooled_bags(batch.bags[feature], row_T, rows_Rd).gathered()
        else:
            rows[feature] = embedding(row_T, rows_Rd)
    return rows


def selected_rows(
    batch: Batch,
    history: History,
    selected: Selection,
    tables: Mapping[Feature, Tensor],
    of_bags: Collection[Feature],
) -> dict[Feature, IndexedRows]:
    """Embedding rows of the selected behaviours, (T, K, d) for each cross feature; padding has row 0.

    Args:
        batch: the targets.
        history: the behaviours.
        selected: of the behaviours.
        tables: by cross feature, all rows of its table.
        of_bags: the features with several values.
    """
    target_T1 = torch.arange(len(batch), device=selected.index_TK.device)[:, None]
    rows: dict[Feature, IndexedRows] = {}
    for feature, rows_Rd in tables.items():
        # Padding has index 0, which seen from its target may be a position that the table does not have: so rows are
        # masked before they are looked up.
        row_TK = behavior_row(feature, batch, history, selected.index_TK, target_T1)
        row_TK = torch.where(selected.valid_TK, row_TK, 0).long()
        of_bag = feature in of_bags
        rows[feature] = pooled_bags(batch.bags[feature], row_TK, rows_Rd) if of_bag else IndexedRows(rows_Rd, row_TK)
    return rows
