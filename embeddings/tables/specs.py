"""Which embedding tables a model declares: the identity, shape and settings of each.

A *set* of tables has one table for every feature of items and behaviours, or, where attention alone reads it, for every
one that attention uses. DARE has the two sets ``attention`` and ``representation``; TWIN has the one set ``shared``.
What belongs to users and impressions has its tables in the set ``context``, whatever the model.
"""

from dataclasses import dataclass
from typing import Literal

from embeddings.sizes import DataSizes, FeatureSides
from schemas.errors import UserError
from schemas.model import Feature, ModelSettings, Table, TableOptimizer, TableSet

FLOAT_BYTES = 4
"""Bytes of a float as a row is looked up."""

GATHERED_BYTES = 4 << 20
"""Rows of an inherent feature's table that every rank gathers in each step take so many bytes at most: 65,536 rows of
16 floats, as many as a batch of 2,048 targets with 31 behaviours each looks up."""

STILL_WITHOUT_GRADIENT: tuple[TableOptimizer, ...] = ("rowwise_adagrad", "adagrad", "sgd")
"""Optimizers that leave a row as it is, and its state, if its gradient is 0."""

CONTEXT = "context"
"""The set of what belongs to users and impressions."""

TableKind = Literal["inherent", "cross", "context"]
"""What a table's feature belongs to: the item, the meeting of user and item, or the user or impression alone."""


@dataclass(frozen=True)
class TableSpec:
    """One embedding table, before it is made, sharded or loaded."""

    kind: TableKind
    set: str
    """The set of tables that it belongs to."""
    feature: Feature
    """The feature whose values its rows embed."""
    sequence: str | None
    """The sequence whose cross feature it holds; None for the other features, which all sequences share."""
    rows: int
    """Number of rows, the unknown id's row 0 included."""
    settings: Table
    """Dim, precision, memory and optimizer."""

    @property
    def name(self) -> str:
        """The table's name in TorchRec's collections, sharding plans and checkpoints."""
        return f"{self.feature}_{self.set}" if self.sequence is None else f"{self.sequence}_{self.feature}_{self.set}"

    @property
    def dim(self) -> int:
        """Floats of a row."""
        return self.settings.dim

    @property
    def inherent(self) -> bool:
        """Whether it is of items, so that its rows are looked up by id, of targets and of behaviours."""
        return self.kind == "inherent"

    @property
    def gathered(self) -> bool:
        """Whether each step gathers all rows of it on every rank, in the place of the rows of the ids that it meets.

        Two exchanges less, and a search scores it from its rows directly; it is cheaper as long as the table is small.
        Not where the optimizer moves a row whose gradient is 0, as Adam's momentum does.
        """
        if not self.inherent:
            return self.kind == "cross"
        small = self.rows * self.dim * FLOAT_BYTES <= GATHERED_BYTES
        return small and self.feature != "item" and self.settings.optimizer in STILL_WITHOUT_GRADIENT


@dataclass(frozen=True)
class TableRoles:
    """Which set of tables serves which role; roles that name the same set share its tables."""

    target_attention: str
    history_attention: str
    target_representation: str
    history_representation: str

    @property
    def attention(self) -> set[str]:
        """The sets that attention and search read."""
        return {self.target_attention, self.history_attention}

    @property
    def representation(self) -> set[str]:
        """The sets whose rows are pooled and predicted from."""
        return {self.target_representation, self.history_representation}

    def scored_alone(self, name: str) -> bool:
        """Whether a set serves attention alone, so that it has tables of what behaviours are scored by."""
        return name not in self.representation

    def sets(self, settings: ModelSettings) -> dict[str, TableSet]:
        """The settings of each set, by name.

        Raises:
            UserError: a set serves attention and representation, and the settings of the two differ.
        """
        if self.attention & self.representation and settings.attention != settings.representation:
            raise UserError(
                f"model.attention: {settings.name} shares one set of tables; it must equal model.representation"
            )
        # Sorted: sets of strings have another order in each process, and all ranks must make the same collections in
        # one order.
        sets = dict.fromkeys(sorted(self.attention), settings.attention)
        return sets | dict.fromkeys(sorted(self.representation), settings.representation)


def declare_tables(
    settings: ModelSettings, sizes: DataSizes, sides: FeatureSides, roles: TableRoles
) -> list[TableSpec]:
    """All tables of a model: those of inherent features, set by set, then those of cross features, then of context.

    Args:
        settings: the sequences, and the settings of the sets.
        sizes: how many rows the data needs for each feature.
        sides: the features.
        roles: which sets there are.

    Raises:
        UserError: a set serves attention and representation, and the settings of the two differ.
    """
    sets = roles.sets(settings)
    scored = {name: roles.scored_alone(name) for name in sets}
    specs = [
        TableSpec("inherent", name, feature, None, sizes.rows(feature), tables.table(feature))
        for name, tables in sets.items()
        for feature in sides.inherent_of(scored[name])
    ]
    specs += [
        TableSpec("cross", name, feature, sequence, sizes.rows(feature, sequence), tables.table(feature))
        for name, tables in sets.items()
        for sequence in settings.retrieved
        for feature in sides.cross_of(scored[name])
    ]
    return specs + [
        TableSpec("context", CONTEXT, feature, None, sizes.rows(feature), settings.context.table(feature))
        for feature in sides.context
    ]
