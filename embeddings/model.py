"""What the models of the family have in common: search, attend, represent, predict.

T = targets, K = behaviours retrieved of a sequence, H = heads, E = dim of all features together.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from embeddings.batch import Batch, Selection
from embeddings.features import Role, Rows
from embeddings.layers.mlp import MLP
from embeddings.layers.pooling import Representation, history_inputs, pooled
from embeddings.layers.scoring import DinScore, DotProduct, MappedScore, ScaledDotProduct, attention_weights
from embeddings.search.local import LocalRows, search_by_score, search_locally
from embeddings.search.sharded import SearchHandle, ShardedTopK
from embeddings.sizes import DataSizes, check_bounds
from embeddings.tables.batch_rows import BatchRows, pooled_on_shards
from embeddings.tables.collections import AllCrossRows, Tables
from schemas.errors import UserError
from schemas.model import INHERENT, Feature, ModelSettings, TableSet

SearchPlace = Literal["shard", "locally", "ids", "none"]

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
            UserError: a set has roles in attention and in representation, whose settings differ.
        """
        attention = {self.target_attention, self.history_attention}
        representation = {self.target_representation, self.history_representation}
        if attention & representation and settings.attention != settings.representation:
            raise UserError(
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

    A model of the family says what is its own: in the class attributes, and by overriding the methods below them.
    """

    roles: ClassVar[TableRoles]
    searched: ClassVar[SearchPlace] = "shard"
    """Where `search` compares behaviours with targets; on the shards only where the settings say so too."""
    target_aware: ClassVar[bool] = True
    """The prediction sees the product of pooled history and target ("TR")."""
    without: ClassVar[frozenset[Feature]] = frozenset()
    """Features that the model does not use, whatever the settings name."""
    auxiliary_always: ClassVar[bool] = False
    """It has a second prediction from the whole history, whatever the settings say."""
    attends_all: ClassVar[bool] = False
    """It keeps all behaviours, not the K of a search."""
    heads: ClassVar[int] = 1
    """Poolings of each history, side by side."""
    auxiliary_heads: ClassVar[int | None] = None
    """The same of the auxiliary prediction; None: as many."""
    needs_categories: ClassVar[bool] = False
    """It searches by category."""

    def __init__(self, settings: ModelSettings, sizes: DataSizes, table_device: torch.device) -> None:
        super().__init__()
        kept = tuple(feature for feature in settings.features if feature not in self.without)
        # Not validated again: settings of a feature that is left out are without effect.
        self.settings = settings.model_copy(update={"features": kept})
        if self.needs_categories and "category" not in kept:
            raise UserError(f"model.features: {settings.name} searches by category; add category to the features")
        if self.needs_categories and sizes.categories < 2:
            raise UserError(
                f"model.name: {settings.name} searches by category, and these data have {sizes.categories} of them; "
                "choose another model"
            )
        if self.attends_all and settings.auxiliary_loss:
            raise UserError(
                f"model.auxiliary_loss: {settings.name} predicts from the whole history already; set it to false"
            )
        self.tables = Tables(self.settings, sizes, self.roles.sets(settings), table_device)
        self.sizes = sizes
        self.row_hook: Callable[[Role, Rows], Rows] | None = None
        """Called in training with the rows of each concern, where it uses them; what it returns is used instead."""
        self.begun: SearchHandle | None = None
        """The search of a batch that is to come."""
        self.scoring = self.make_scoring()
        self.make_modules()
        self.prediction = MLP(self._inputs(self.heads), settings.hidden)
        self.auxiliary = None
        if settings.auxiliary_loss or self.auxiliary_always:
            self.auxiliary = MLP(self._inputs(self.auxiliary_heads or self.heads), AUXILIARY_HIDDEN)

    def make_scoring(self) -> nn.Module:
        """What scores K behaviours (T, K, ...) for their targets (T, ...): (T, K), or (T, H, K)."""
        return ScaledDotProduct()

    def make_modules(self) -> None:
        """Make what else the model has of its own."""

    def search(self, batch: Batch, cross: AllCrossRows) -> dict[str, Selection]:
        """The K behaviours of each target in each sequence that the score ranks highest, without gradient.

        Args:
            batch: the targets and their histories.
            cross: all rows of the cross tables.

        Returns:
            By sequence, in the order of ``model.retrieved``.
        """
        scoring, retrieved = self.scoring, self.settings.retrieved
        if not isinstance(scoring, DotProduct):
            return search_by_score(self._all_rows(batch, cross), scoring, retrieved)
        if not self.searches_on_shards:
            return search_locally(self._all_rows(batch, cross), scoring, retrieved)
        begun, self.begun = self.begun, None
        if begun is None or begun.batch is not batch:
            begun, self.begun = SearchHandle(self._top_k(scoring), batch), begun
        return begun.finish(cross[self.roles.target_attention], cross[self.roles.history_attention])

    def begin(self, batch: Batch, stream: torch.cuda.Stream | None = None) -> None:
        """Send the ids of a batch that `forward` will be given to the shards; every rank must call it.

        Does nothing where no shards are searched. Another batch may be predicted in between.

        Args:
            batch: the very object that `forward` will be given.
            stream: of a GPU, see `SearchHandle`.

        Raises:
            UserError: as `forward`.
        """
        if self.searches_on_shards:
            assert isinstance(self.scoring, DotProduct)
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                check_bounds(batch, self.sizes)
            self.begun = SearchHandle(self._top_k(self.scoring), batch, stream)

    def _top_k(self, scoring: DotProduct) -> ShardedTopK:
        """It belongs to the tables as they are sharded now, so it is no part of the model."""
        return ShardedTopK(
            self.tables.inherent[self.roles.target_attention],
            self.tables.inherent[self.roles.history_attention],
            scoring,
            self.settings.retrieved,
            self.sizes,
            self.tables.cross_features,
            self.tables.codecs,
        )

    def attention(self, target: Rows, behaviors: Rows, chosen: Selection) -> Tensor:
        """Weights of the chosen behaviours, (T, K) or (T, H, K), from the attention rows of target and behaviours."""
        score_TK = self.scoring(target, behaviors)
        if chosen.log_count_TK is not None:
            score_TK = score_TK + chosen.log_count_TK
        return attention_weights(score_TK, chosen.valid_TK)

    def auxiliary_attention(self, target: Rows, behaviors: Rows, chosen: Selection) -> Tensor:
        """The same over the whole history, for the auxiliary prediction."""
        return self.attention(target, behaviors, chosen)

    def represent(self, target: Rows, behaviors: Rows) -> tuple[Rows, Rows]:
        """What is pooled and predicted from, made of the representation rows of target and behaviours."""
        return target, behaviors

    def pool(self, weight_TK: Tensor, behaviors: Rows) -> Rows:
        """``sum_i w_i e_i``, (T, ...); of several heads side by side."""
        return pooled(weight_TK, behaviors)

    def represented_dims(self) -> dict[Feature, int]:
        """Dims of what `represent` returns."""
        name = self.roles.target_representation
        return self.tables.inherent_dims(name) | self.tables.cross_dims(name)

    @property
    def predicted_from(self) -> int:
        """Floats that the predictions see of each target, in training."""
        return self.prediction.inputs + (self.auxiliary.inputs if self.auxiliary is not None else 0)

    def search_products(self, dim: int) -> int:
        """Multiplications that a search makes of a target and a behaviour whose rows have ``dim`` floats, for plans."""
        assert isinstance(self.scoring, DotProduct | MappedScore | DinScore), "it searches by something else"
        return self.scoring.products(dim)

    def split_gradients(self, rows: BatchRows) -> tuple[BatchRows, BatchRows]:
        """The rows for attention and those for representation; the same ones, unless gradients are told apart."""
        return rows, rows

    @property
    def searches_on_shards(self) -> bool:
        """Whether the model can, the settings want it, and the tables are sharded."""
        wanted = self.searched == "shard" and self.settings.search == "shard"
        return wanted and self.tables.row_wise(self.roles.history_attention)

    @property
    def pools_on_shards(self) -> bool:
        """Rows that attention brings home, that are tapped or that are mapped are pooled there."""
        tapped = self.row_hook is not None and self.training
        return self.searches_on_shards and self.could_pool_on_shards and not tapped

    @property
    def could_pool_on_shards(self) -> bool:
        """Whether representation has tables of its own, whose rows are pooled as they are."""
        representation = {self.roles.target_representation, self.roles.history_representation}
        attention = {self.roles.target_attention, self.roles.history_attention}
        plain = type(self).represent is CtrModel.represent and type(self).pool is CtrModel.pool
        return plain and len(representation) == 1 and not attention & representation

    def forward(self, batch: Batch) -> Prediction:
        """Predict the targets of ``batch``; every rank must call it, with as few targets as none.

        No branch here depends on the batch: a rank that took another one would leave the others in a collective.

        Raises:
            UserError: the batch lacks a sequence or a feature of the settings, or has windows longer than N.
        """
        if self.begun is None or self.begun.batch is not batch:
            check_bounds(batch, self.sizes)
        cross = self.tables.cross_rows(batch.item_T.device)
        auxiliary = self.auxiliary is not None and self.training
        whole = auxiliary or self.attends_all
        sequences = self.settings.retrieved if whole else ()
        all_of_it = {name: Selection.everything(batch.histories[name]) for name in sequences}
        selected = all_of_it if self.attends_all else self.search(batch, cross)
        pools = self.pools_on_shards
        attention = {self.roles.target_attention}, {self.roles.history_attention}
        representation = {self.roles.target_representation}, {self.roles.history_representation}
        rows = BatchRows(
            batch,
            self.tables,
            cross,
            attention[0] | (set() if pools else representation[0]),
            attention[1] | (set() if pools else representation[1]),
            selected,
            whole,
        )
        attended, represented = self.split_gradients(rows)
        weights = self._weights(attended, selected, self.attention)
        if pools:
            name = self.roles.history_representation
            histories = pooled_on_shards(batch, self.tables, name, cross[name], selected, weights)
        else:
            histories = self._pooled_locally(represented, selected, weights)
        logit_T = self.prediction(self._prediction_input(histories))
        if not auxiliary:
            return Prediction(logit_T)
        assert self.auxiliary is not None
        weights = self._weights(attended, all_of_it, self.auxiliary_attention)
        histories = self._pooled_locally(represented, all_of_it, weights)
        return Prediction(logit_T, self.auxiliary(self._prediction_input(histories)))

    def _inputs(self, heads: int) -> int:
        inherent, cross = 0, 0
        for feature, dim in self.represented_dims().items():
            inherent, cross = (inherent + dim, cross) if feature in INHERENT else (inherent, cross + dim)
        parts = (2 if self.target_aware else 1) * heads
        return inherent + len(self.settings.retrieved) * (cross + parts * (inherent + cross))

    def _all_rows(self, batch: Batch, cross: AllCrossRows) -> LocalRows:
        """Attention rows of all behaviours, brought home."""
        target_set, history_set = self.roles.target_attention, self.roles.history_attention
        return LocalRows.look_up(batch, self.tables, cross, target_set, history_set)

    def _weights(
        self,
        rows: BatchRows,
        selected: Mapping[str, Selection],
        attention: Callable[[Rows, Rows, Selection], Tensor],
    ) -> dict[str, Tensor]:
        weights = {}
        for sequence, chosen in selected.items():
            target = self._hooked("attention", rows.targets(self.roles.target_attention, sequence))
            behaviors = self._hooked("attention", rows.behaviors(self.roles.history_attention, sequence, chosen))
            weights[sequence] = attention(target, behaviors, chosen)
        return weights

    def _pooled_locally(
        self, rows: BatchRows, selected: Mapping[str, Selection], weights: Mapping[str, Tensor]
    ) -> dict[str, Representation]:
        found = {}
        for sequence, chosen in selected.items():
            target = self._hooked("representation", rows.targets(self.roles.target_representation, sequence))
            shown = rows.behaviors(self.roles.history_representation, sequence, chosen)
            target, behaviors = self.represent(target, self._hooked("representation", shown))
            found[sequence] = Representation(target, self.pool(weights[sequence], behaviors))
        return found

    def _prediction_input(self, represented: Mapping[str, Representation]) -> Tensor:
        """All that the prediction sees, (T, inputs)."""
        inputs: list[Tensor] = []
        for of_sequence in represented.values():
            inputs += [] if inputs else [of_sequence.target.inherent]
            inputs += of_sequence.target.cross.values()
            inputs += history_inputs(of_sequence, self.target_aware)
        return torch.cat(inputs, dim=1)

    def _hooked(self, concern: Role, rows: Rows) -> Rows:
        return self.row_hook(concern, rows) if self.row_hook and self.training else rows
