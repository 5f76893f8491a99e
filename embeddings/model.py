"""What the models of the family have in common: search, attend, represent, predict.

T = targets, K = behaviours retrieved of a sequence, H = heads, E = dim of all features together, I = floats that a
prediction sees of a target.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import starmap
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from embeddings.batch import Batch, Branch, Selection
from embeddings.features import RowHook, Rows, RowSource
from embeddings.layers.mlp import logits_of, make_prediction
from embeddings.layers.pooling import Numbers, Representation, all_inputs, history_inputs, pooled, weighted_sum
from embeddings.layers.scoring import DinScore, DotProduct, MappedScore, ScaledDotProduct, attention_weights
from embeddings.search.local import LocalRows, search_by_dot_product, search_by_score
from embeddings.search.sharded import SearchChannel, SearchHandle, ShardedTopK, SmallAttentionRows
from embeddings.sizes import DataSizes, check_bounds, check_categories
from embeddings.tables.batch_rows import BatchRows, pooled_on_shards
from embeddings.tables.collections import SmallRows, Tables
from embeddings.tables.specs import TableRoles
from schemas.errors import UserError
from schemas.model import Feature, ModelSettings

SearchPlace = Literal["shard", "local", "ids", "none"]
"""Where a search looks at behaviours: ``shard``, where their rows are; ``local``, on the sample's rank, which fetches
all rows; ``ids``, there too, but by ids and order alone; ``none``, nowhere: the model keeps all behaviours."""

AUXILIARY_HIDDEN = (200,)
"""Hidden layers of the auxiliary loss's prediction (the authors' code)."""


@dataclass(frozen=True)
class Prediction:
    """What a model says about T targets."""

    logits: tuple[Tensor, ...]
    """float32 (T,) each: log odds of each task, the main one first."""
    auxiliary_logits: tuple[Tensor, ...] = ()
    """Those from attention over the whole history; empty without ``auxiliary_loss``, and in evaluation."""

    @property
    def logit_T(self) -> Tensor:
        """float32: log odds of the main task."""
        return self.logits[0]

    @property
    def auxiliary_logit_T(self) -> Tensor | None:
        """float32: the main task's from attention over the whole history, if there is one."""
        return self.auxiliary_logits[0] if self.auxiliary_logits else None


class CtrModel(nn.Module):
    """A click-through-rate model over long histories.

    1. search: the K behaviours of each sequence that matter to the target, without gradient;
    2. attention: the score of each of them again, now with gradient, and the softmax over those K;
    3. representation: their rows, pooled with the weights;
    4. prediction: an MLP on the target and the pooled histories.

    A member of the family sets the class attributes and overrides the methods where it differs.
    """

    roles: ClassVar[TableRoles]
    searched: ClassVar[SearchPlace] = "shard"
    """Where `search` compares behaviours with targets; on the shards only where the settings say so too."""
    target_aware: ClassVar[bool] = True
    """Whether the prediction sees the product of pooled history and target ("TR")."""
    without: ClassVar[frozenset[Feature]] = frozenset()
    """Features that the model does not use, whatever the settings name."""
    auxiliary_always: ClassVar[bool] = False
    """Whether it has a second prediction from the whole history even without ``auxiliary_loss``."""
    attends_all: ClassVar[bool] = False
    """Whether it attends to all behaviours, not to the K of a search."""
    heads: ClassVar[int] = 1
    """Poolings of each history, side by side."""
    auxiliary_heads: ClassVar[int | None] = None
    """Poolings of each history for the auxiliary prediction; None: as many as for the main one."""
    needs_categories: ClassVar[bool] = False
    """Whether it searches by category, so that the data must have categories."""

    def __init__(self, settings: ModelSettings, sizes: DataSizes, table_device: torch.device) -> None:
        super().__init__()
        kept = tuple(feature for feature in settings.features if feature.name not in self.without)
        # Not validated again: settings of a feature that is left out are without effect.
        self.settings = settings.model_copy(update={"features": kept})
        self.sizes = sizes.used(self.settings.feature_names)
        """Sizes of what the model uses."""
        if self.needs_categories:
            check_categories(settings.name, self.sizes)
        # The auxiliary loss trains attention on behaviours that the search left out; here it leaves out none.
        if self.attends_all and settings.auxiliary_loss:
            raise UserError(
                f"model.auxiliary_loss: {settings.name} predicts from the whole history already; set it to false"
            )
        self.tables = Tables(self.settings, sizes, self.roles, table_device)
        # In this order: the dims of what is represented may depend on the model's own modules (`TwinProjection`), and
        # the width of the prediction depends on those dims.
        self.scoring = self.make_scoring()
        self.make_modules()
        inputs = self._inputs(self.heads, len(settings.recent))
        self.prediction = make_prediction(inputs, settings.hidden, settings.tasks, settings.mixture)
        self.auxiliary = None
        if settings.auxiliary_loss or self.auxiliary_always:
            inputs = self._inputs(self.auxiliary_heads or self.heads)
            self.auxiliary = make_prediction(inputs, AUXILIARY_HIDDEN, settings.tasks, None)

    def make_scoring(self) -> nn.Module:
        """Make the module that scores K behaviours (T, K, ...) for their targets (T, ...): (T, K), or (T, H, K)."""
        return ScaledDotProduct()

    def make_modules(self) -> None:
        """Make the other modules that this model needs, before the prediction is made."""

    def start_search(self, batch: Batch, channel: SearchChannel | None = None) -> SearchHandle | None:
        """Check a batch, and send its ids to the shards that will search for it; every rank must call it.

        Ids do not depend on weights, so a batch's search may start while the batch before it is still learnt from.

        Args:
            batch: the very object that `forward` will be given.
            channel: what the ids travel on; None: the tables' group and the current stream.

        Returns:
            What `forward` takes beside the batch; None where this model does not search on the shards.

        Raises:
            UserError: the batch, or that of another rank, lacks a sequence or a feature of the settings, is not within
                the tables, or has windows longer than N.
        """
        if not self.searches_on_shards:
            check_bounds(batch, self.sizes)
            return None
        assert isinstance(self.scoring, DotProduct)
        return SearchHandle(self._top_k(self.scoring, batch), batch, channel)

    def warm_search(self, device: torch.device) -> None:
        """Compile, or load, what searches on a GPU will need, so that no step has to wait for it; nothing on a CPU."""
        if device.type != "cuda" or self.searched == "none":
            return
        # Triton takes a second or more to load: only those who need it pay for it.
        from embeddings.search.topk.cuda import warm

        rows = self.tables.spec(self.roles.history_attention, "item").settings.precision
        # Rows that were looked up are float32, those that are read where they are may be 16 bits.
        for k in set(self.settings.retrieved.values()):
            for dtype in {torch.float32, {"fp32": torch.float32, "fp16": torch.float16}[rows]}:
                warm(k, dtype, device)

    @record_function("dare/search")
    def search(self, batch: Batch, small: SmallRows, handle: SearchHandle | None) -> dict[str, Selection]:
        """Select the K behaviours of each sequence that score highest for each target, without gradient.

        Args:
            batch: the targets and their histories.
            small: all rows of the small tables.
            handle: the search that was started for this batch; None: the behaviours are searched on this rank.

        Returns:
            The selection of each sequence, in the order of ``model.retrieved``.
        """
        if handle is None:
            # Not on the shards: the rows of all behaviours come to this rank, or none are needed at all.
            return self.search_locally(batch, small)
        # The same object, not an equal one: the handle's indices point into the histories that were sent.
        assert handle.batch is batch, "the search of another batch"
        target_set, history_set = self.roles.target_attention, self.roles.history_attention
        attention = SmallAttentionRows(
            small.cross[target_set], small.cross[history_set], small.inherent[target_set], small.inherent[history_set]
        )
        return handle.finish(attention)

    def search_locally(self, batch: Batch, small: SmallRows) -> dict[str, Selection]:
        """Search on the rank that has the targets; arguments and result are those of `search`."""
        rows, retrieved = self._local_rows(batch, small), self.settings.retrieved
        if isinstance(self.scoring, DotProduct):
            return search_by_dot_product(rows, self.scoring, retrieved)
        return search_by_score(rows, self.scoring, retrieved)

    def _top_k(self, scoring: DotProduct, batch: Batch) -> ShardedTopK:
        """Make the search on the shards: anew for each search, because it reads the tables as they are sharded now."""
        return ShardedTopK(
            self.tables.inherent[self.roles.target_attention],
            self.tables.inherent[self.roles.history_attention],
            scoring,
            self.settings.retrieved,
            self.sizes.with_bags(batch),
            self.tables.sides,
            self.tables.codecs,
        )

    def attention(self, target: Rows, behaviors: Rows, chosen: Selection) -> Tensor:
        """Weights of the chosen behaviours, (T, K) or (T, H, K), from the attention rows of target and behaviours."""
        # Scored again, because the search's scores have no gradient and may have been rounded on their way.
        score_TK = self.scoring(target, behaviors)
        # A cluster of n behaviours weighs as n of its kind would: ``exp(s + log n) = n exp(s)`` (TWIN-V2).
        if chosen.log_count_TK is not None:
            score_TK = score_TK + chosen.log_count_TK
        return attention_weights(score_TK, chosen.valid_TK)

    def auxiliary_attention(self, target: Rows, behaviors: Rows, chosen: Selection) -> Tensor:
        """Weights over the whole history for the auxiliary prediction; arguments and result as of `attention`."""
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

    def attended_dims(self) -> dict[Feature, int]:
        """Dims of the rows that `attention` is given."""
        name = self.roles.target_attention
        return self.tables.inherent_dims(name, scored=True) | self.tables.cross_dims(name, scored=True)

    @property
    def predicted_from(self) -> int:
        """Floats that the predictions see of each target, in training."""
        return self.prediction.inputs + (self.auxiliary.inputs if self.auxiliary is not None else 0)

    def search_products(self, dim: int) -> int:
        """Multiplications that a search makes of a target and a behaviour whose rows have ``dim`` floats, for plans."""
        assert isinstance(self.scoring, DotProduct | MappedScore | DinScore), "it searches by something else"
        return self.scoring.products(dim)

    def split_gradients(self, rows: BatchRows) -> tuple[BatchRows, BatchRows]:
        """The rows for attention and for representation: the same, unless the model routes their gradients."""
        return rows, rows

    @property
    def searches_on_shards(self) -> bool:
        """Whether the model can, the settings want it, and the tables are sharded."""
        # It depends on class, settings and plan, which do not differ between ranks: so all ranks take the same way.
        wanted = self.searched == "shard" and self.settings.search == "shard"
        return wanted and self.tables.row_wise(self.roles.history_attention)

    @property
    def pools_on_shards(self) -> bool:
        """Whether histories are pooled where their rows are, so that one vector a history travels back."""
        # Where one rank has all rows, a sum of rows is made where it is needed.
        name = self.roles.history_representation
        return self.searches_on_shards and self.could_pool_on_shards and self.tables.ranks(name) > 1

    @property
    def could_pool_on_shards(self) -> bool:
        """Whether representation has one set of tables of its own, whose rows are pooled as they are."""
        attention, representation = self.roles.attention, self.roles.representation
        # A shard can only sum rows as they are. Rows that pass a map before the sum, or that attention needs on this
        # rank in any case, travel and are pooled here.
        plain = type(self).represent is CtrModel.represent and type(self).pool is CtrModel.pool
        return plain and len(representation) == 1 and not attention & representation

    def forward(self, batch: Batch, handle: SearchHandle | None = None, row_hook: RowHook | None = None) -> Prediction:
        """Predict the targets of ``batch``; every rank must call it, with as few targets as none.

        No branch here depends on the batch: a rank that took another one would leave the others in a collective.

        Args:
            batch: the targets and their histories.
            handle: what `start_search` returned for this batch; None: the search starts here.
            row_hook: called in training with the rows of each role, to watch their gradients; changes no number.

        Raises:
            UserError: the batch lacks a sequence or a feature of the settings, or has windows longer than N.
        """
        if handle is None:
            handle = self.start_search(batch)
        # From here on every rank enters the same collectives in the same order: small tables, search, lookups, pooling,
        # batch normalisation. In the backward pass they come in the reverse order, which autograd makes the same on all
        # ranks.
        small = self.tables.small_rows(batch.item_T.device)
        # Evaluation needs the main prediction alone.
        predicts_twice = self.auxiliary is not None and self.training
        looks_up_all = predicts_twice or self.attends_all
        # With all behaviours looked up, those selected and the whole history are taken from one lookup.
        sequences = self.settings.retrieved if looks_up_all else ()
        everything = {sequence: Selection.everything(batch.histories[sequence]) for sequence in sequences}
        selected = everything if self.attends_all else self.search(batch, small, handle)
        # The latest behaviours of a sequence are a branch of their own, whether the search has kept them too or not.
        branches = list(starmap(Branch, selected.items()))
        for sequence, count in self.settings.recent.items():
            branches.append(Branch(sequence, Selection.latest(batch.histories[sequence], count)))
        rows = self._look_up(batch, small, branches, looks_up_all)
        # Twice the same rows, except in models that look at the gradients of both roles before they are added.
        attention_rows, representation_rows = self.split_gradients(rows)

        # Equation 1 of DARE, over the K that were kept; then ``h = sum_i w_i (e_i * v_t)`` and the prediction.
        weights = self.attend(attention_rows, branches, self.attention, row_hook)
        if self.pools_on_shards:
            input_TI = self._pool_on_shards(batch, small, branches, weights, row_hook)
        else:
            input_TI = self.pool_locally(representation_rows, branches, weights, row_hook)
        sides, context = self.tables.sides, self.tables.context_rows(batch)
        seen = partial(all_inputs, pool=self.pool_numbers, context=context)
        logits = logits_of(self.prediction, seen(input_TI, Numbers.of(batch, branches, sides), weights))
        if not predicts_twice:
            return Prediction(logits)

        # The second prediction: the same tables, but the whole history and an MLP of its own.
        assert self.auxiliary is not None
        branches = list(starmap(Branch, everything.items()))
        weights = self.attend(attention_rows, branches, self.auxiliary_attention, row_hook)
        input_TI = self.pool_locally(representation_rows, branches, weights, row_hook)
        numbers = Numbers.of(batch, branches, sides)
        return Prediction(logits, logits_of(self.auxiliary, seen(input_TI, numbers, weights)))

    def _inputs(self, heads: int, recent: int = 0) -> int:
        # Counted as `_prediction_input` concatenates: the target's inherent rows once, then for each sequence its cross
        # rows, the pooled history of each head, and with TR its product with the target; the latter two once more for
        # each sequence whose latest behaviours are a branch of their own.
        inherent, cross = 0, 0
        sides = self.tables.sides
        for feature, dim in self.represented_dims().items():
            inherent, cross = (inherent + dim, cross) if feature in sides.inherent else (inherent, cross + dim)
        parts = (2 if self.target_aware else 1) * heads
        sequences = len(self.settings.retrieved)
        branches = sequences + recent
        inputs = inherent + sequences * cross + branches * parts * (inherent + cross)
        # Then what `all_inputs` adds.
        numbers = len(sides.carried.intersection(sides.numbers)) + branches * len(sides.numbers) * heads
        return inputs + numbers + self.tables.context_inputs

    def pool_numbers(self, weight_TK: Tensor, number_TKn: Tensor) -> Tensor:
        """Pool the numbers of behaviours, (T, K, n): ``sum_i w_i x_i``, (T, n); of several heads side by side."""
        return weighted_sum(weight_TK, number_TKn)

    def _local_rows(self, batch: Batch, small: SmallRows) -> LocalRows:
        """The attention rows of all targets and behaviours, on this rank and without gradient."""
        target_set, history_set = self.roles.target_attention, self.roles.history_attention
        return LocalRows.look_up(batch, self.tables, small, target_set, history_set, self.sizes.lengths)

    @record_function("dare/lookups")
    def _look_up(self, batch: Batch, small: SmallRows, branches: Sequence[Branch], looks_up_all: bool) -> BatchRows:
        """The rows that come to this rank, with gradient: representation's only if they are pooled here."""
        target_sets, history_sets = {self.roles.target_attention}, {self.roles.history_attention}
        # Pooled on the shards, representation rows have a lookup of their own, which includes the targets.
        if not self.pools_on_shards:
            target_sets.add(self.roles.target_representation)
            history_sets.add(self.roles.history_representation)
        return BatchRows(batch, self.tables, small, target_sets, history_sets, branches, looks_up_all)

    @record_function("dare/dense")
    def attend(
        self,
        rows: RowSource,
        branches: Sequence[Branch],
        attention: Callable[[Rows, Rows, Selection], Tensor],
        row_hook: RowHook | None = None,
    ) -> list[Tensor]:
        """The attention weights of each branch's behaviours, (T, K) or (T, H, K)."""
        weights = list[Tensor]()
        for sequence, chosen in branches:
            target = rows.targets(self.roles.target_attention, sequence, scored=True)
            behaviors = rows.behaviors(self.roles.history_attention, sequence, chosen, scored=True)
            weights.append(attention(target, behaviors, chosen))
            if row_hook is not None and self.training:
                # ``chosen`` as a default: a closure would see the last branch of the loop, as it is called in the
                # backward pass.
                def attended(rows: Sequence[Rows], chosen: Selection = chosen) -> Tensor:
                    target, behaviors = rows
                    return attention(target, behaviors, chosen)

                row_hook("attention", [target, behaviors], attended, weights[-1], [None, None])
        return weights

    @record_function("dare/dense")
    def pool_locally(
        self,
        rows: RowSource,
        branches: Sequence[Branch],
        weights: Sequence[Tensor],
        row_hook: RowHook | None = None,
    ) -> Tensor:
        """All that a prediction sees, (T, inputs), from representation rows that are on this rank."""
        # In pairs, target and behaviours of each branch: a hook may call the function below with other rows in their
        # place.
        looked_up: list[Rows] = []
        for sequence, chosen in branches:
            looked_up.append(rows.targets(self.roles.target_representation, sequence))
            looked_up.append(rows.behaviors(self.roles.history_representation, sequence, chosen))

        def pooled_input(looked_up: Sequence[Rows], weights: Iterable[Tensor]) -> Tensor:
            histories = []
            for target, behaviors, weight_TK in zip(looked_up[::2], looked_up[1::2], weights, strict=True):
                target, behaviors = self.represent(target, behaviors)
                histories.append(Representation(target, self.pool(weight_TK, behaviors)))
            return self._prediction_input(histories)

        input_TI = pooled_input(looked_up, weights)
        if row_hook is not None and self.training:
            # Detached: what reaches the weights is attention's gradient, not that of representation's rows.
            fixed = [weight_TK.detach() for weight_TK in weights]
            function = partial(pooled_input, weights=fixed)
            row_hook("representation", looked_up, function, input_TI, [None] * len(looked_up))
        return input_TI

    @record_function("dare/dense")
    def _pool_on_shards(
        self,
        batch: Batch,
        small: SmallRows,
        branches: Sequence[Branch],
        weights: Sequence[Tensor],
        row_hook: RowHook | None,
    ) -> Tensor:
        """All that the prediction sees, (T, inputs); the behaviours' representation rows stay where they are."""
        name = self.roles.history_representation
        # One set serves targets and behaviours here, as `could_pool_on_shards` asks.
        histories = pooled_on_shards(batch, self.tables, name, small, branches, weights)
        input_TI = self._prediction_input(histories)
        if row_hook is not None and self.training:

            def pooled_input(parts: Sequence[Rows]) -> Tensor:
                return self._prediction_input(map(Representation, parts[::2], parts[1::2]))

            # The behaviours' own rows are not on this rank, but their gradients follow from that of their sum and the
            # weights.
            parts = [part for history in histories for part in (history.target, history.pooled)]
            part_weights = [weight for weight_TK in weights for weight in (None, weight_TK)]
            row_hook("representation", parts, pooled_input, input_TI, part_weights)
        return input_TI

    def _prediction_input(self, histories: Iterable[Representation]) -> Tensor:
        """The target's rows and, for each branch, the pooled history and its product with the target: (T, inputs)."""
        inputs: list[Tensor] = []
        for number, history in enumerate(histories):
            # The inherent rows are the target's own: they are the same seen from every sequence.
            inputs += [] if inputs else [history.target.inherent]
            # The latest behaviours come after those retrieved of all sequences, which have shown the target's rows.
            inputs += history.target.cross.values() if number < len(self.settings.retrieved) else ()
            inputs += history_inputs(history, self.target_aware)
        return torch.cat(inputs, dim=1)
