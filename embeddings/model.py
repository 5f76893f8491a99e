"""What the models of the family have in common: search, attend, represent, predict.

T = targets, K = behaviours retrieved of a sequence.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from embeddings.batch import Batch
from embeddings.bounds import check_bounds
from embeddings.collective import max_over_ranks
from embeddings.lookup import BatchRows
from embeddings.perceptron import Perceptron
from embeddings.pooled_lookup import pooled_on_shards
from embeddings.representation import Representation, history_inputs, pooled
from embeddings.rows import Concern, Rows
from embeddings.scoring import ScaledDotProduct, attention_weights
from embeddings.search.home import search_at_home
from embeddings.search.on_shard import ShardedTopK
from embeddings.search.selection import Selection
from embeddings.sizes import DataSizes
from embeddings.tables import AllCrossRows, Tables
from schemas.model import ModelSettings, TableSet

AUXILIARY_HIDDEN = (200,)
"""Hidden layers of the auxiliary loss's prediction (the authors' code)."""


@dataclass(frozen=True)
class Prediction:
    """What a model says about T targets."""

    logit_T: Tensor
    """float32: log odds of a click."""
    auxiliary_logit_T: Tensor | None = None
    """float32: the same from attention over the whole history; None without ``auxiliary_loss``, and in evaluation."""

    @property
    def probability_T(self) -> Tensor:
        """float32, 0 .. 1."""
        return self.logit_T.sigmoid()


@dataclass(frozen=True)
class TableRoles:
    """Which set of tables plays which role; roles that name the same set share it."""

    target_attention: str
    history_attention: str
    target_representation: str
    history_representation: str

    def sets(self, settings: ModelSettings) -> dict[str, TableSet]:
        """The settings of each set, by name.

        Raises:
            ValueError: a set has roles in attention and in representation, whose settings differ.
        """
        attention = {self.target_attention, self.history_attention}
        representation = {self.target_representation, self.history_representation}
        if attention & representation and settings.attention != settings.representation:
            raise ValueError(
                f"model.attention: {settings.name} shares one set of tables; it must equal model.representation"
            )
        sets = dict.fromkeys(sorted(attention), settings.attention)
        return sets | dict.fromkeys(sorted(representation), settings.representation)


class CtrModel(nn.Module):
    """A click-through-rate model over long histories.

    1. search: the K behaviours of each sequence that matter to the target, without gradient;
    2. attention: the score of each of them again, now with gradient, and the softmax over those K;
    3. representation: their rows, pooled with the weights;
    4. prediction: a perceptron on the target and the pooled histories.

    A model of the family says what is its own in the class attributes.
    """

    roles: ClassVar[TableRoles]
    target_aware: ClassVar[bool] = True
    """The prediction sees the product of pooled history and target ("TR")."""

    def __init__(self, settings: ModelSettings, sizes: DataSizes, table_device: torch.device) -> None:
        super().__init__()
        self.settings = settings
        self.tables = Tables(settings, sizes, self.roles.sets(settings), table_device)
        self.sizes = sizes
        self.tap: Callable[[Concern, Rows], Rows] | None = None
        """Called in training with the rows of each concern, where it uses them; what it returns is used instead."""
        self.scoring = ScaledDotProduct()
        inputs = self._inputs()
        self.prediction = Perceptron(inputs, settings.hidden)
        self.auxiliary = Perceptron(inputs, AUXILIARY_HIDDEN) if settings.auxiliary_loss else None

    def _inputs(self) -> int:
        name = self.roles.target_representation
        inherent = sum(self.tables.inherent_dims(name).values())
        cross = sum(self.tables.cross_dims(name).values())
        parts = 2 if self.target_aware else 1
        return inherent + len(self.settings.retrieved) * (cross + parts * (inherent + cross))

    def forward(self, batch: Batch) -> Prediction:
        """Predict the targets of ``batch``; every rank must call it, with as few targets as none.

        No branch here depends on the batch: a rank that took another one would leave the others in a collective.

        Raises:
            ValueError: the batch lacks a sequence or a feature of the settings, or has windows longer than N.
        """
        check_bounds(batch, self.sizes)
        cross = self.tables.cross_rows(batch.item_T.device)
        behaviors = sum(len(batch.histories[name].item_M) for name in self.settings.retrieved)
        targets, behaviors = max_over_ranks([len(batch), behaviors], batch.item_T.device)
        everything = targets + behaviors + 1
        selected = self.search(batch, cross, everything)
        whole = self.auxiliary is not None and self.training
        pools = self._pools_on_shards
        rows = BatchRows(
            batch,
            self.tables,
            cross,
            {self.roles.target_attention} | ({self.roles.target_representation} if not pools else set()),
            {self.roles.history_attention} | ({self.roles.history_representation} if not pools else set()),
            selected,
            whole,
            bags=everything if whole else targets * (1 + sum(self.settings.retrieved.values())) + 1,
        )
        weights = self._weights(rows, selected)
        if pools:
            name = self.roles.history_representation
            bags = targets * (1 + len(selected)) + 1
            represented = pooled_on_shards(batch, self.tables, name, cross[name], selected, weights, bags)
        else:
            represented = self._pooled_at_home(rows, selected, weights)
        logit_T = self.prediction(self._prediction_input(represented))
        if not whole:
            return Prediction(logit_T)
        assert self.auxiliary is not None
        all_of_it = {name: Selection.everything(batch.histories[name]) for name in selected}
        represented = self._pooled_at_home(rows, all_of_it, self._weights(rows, all_of_it))
        return Prediction(logit_T, self.auxiliary(self._prediction_input(represented)))

    def search(self, batch: Batch, cross: AllCrossRows, bags: int) -> dict[str, Selection]:
        """The K behaviours of each target in each sequence that the score ranks highest, without gradient.

        Args:
            batch: the targets and their histories.
            cross: all rows of the cross tables.
            bags: the most targets and behaviours together that a rank has; the same on all ranks.

        Returns:
            By sequence, in the order of ``model.retrieved``.
        """
        target_set, history_set = self.roles.target_attention, self.roles.history_attention
        if self._searches_on_shards:
            top_k = ShardedTopK(
                self.tables.inherent[target_set],
                self.tables.inherent[history_set],
                self.scoring,
                self.settings.retrieved,
                self.sizes.lengths,
                cross[target_set],
                cross[history_set],
            )
            selected: dict[str, Selection] = top_k(batch).wait()
            return selected
        return search_at_home(
            batch, self.tables, self.scoring, target_set, history_set, cross, self.settings.retrieved, bags
        )

    @property
    def _searches_on_shards(self) -> bool:
        """Tables that are not sharded are at home."""
        return self.settings.search == "shard" and self.tables.row_wise(self.roles.history_attention)

    @property
    def _pools_on_shards(self) -> bool:
        """Rows that attention brings home, or that are tapped, are pooled there."""
        representation = {self.roles.target_representation, self.roles.history_representation}
        attention = {self.roles.target_attention, self.roles.history_attention}
        tapped = self.tap is not None and self.training
        return self._searches_on_shards and len(representation) == 1 and not attention & representation and not tapped

    def _weights(self, rows: BatchRows, selected: Mapping[str, Selection]) -> dict[str, Tensor]:
        """Attention over the selected behaviours, by sequence, (T, K)."""
        weights = {}
        for sequence, chosen in selected.items():
            attended = self._tapped("attention", rows.targets(self.roles.target_attention, sequence))
            attending = self._tapped("attention", rows.behaviors(self.roles.history_attention, sequence, chosen))
            weights[sequence] = attention_weights(self.scoring(attended, attending), chosen.valid_TK)
        return weights

    def _pooled_at_home(
        self, rows: BatchRows, selected: Mapping[str, Selection], weights: Mapping[str, Tensor]
    ) -> dict[str, Representation]:
        found = {}
        for sequence, chosen in selected.items():
            target = self._tapped("representation", rows.targets(self.roles.target_representation, sequence))
            shown = rows.behaviors(self.roles.history_representation, sequence, chosen)
            behaviors = self._tapped("representation", shown)
            found[sequence] = Representation(target, pooled(weights[sequence], behaviors))
        return found

    def _prediction_input(self, represented: Mapping[str, Representation]) -> Tensor:
        """All that the prediction sees, (T, inputs)."""
        inputs: list[Tensor] = []
        for of_sequence in represented.values():
            inputs += [] if inputs else [of_sequence.target.inherent]
            inputs += of_sequence.target.cross.values()
            inputs += history_inputs(of_sequence, self.target_aware)
        return torch.cat(inputs, dim=1)

    def _tapped(self, concern: Concern, rows: Rows) -> Rows:
        return self.tap(concern, rows) if self.tap and self.training else rows
