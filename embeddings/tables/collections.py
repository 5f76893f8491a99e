"""The embedding tables of a model in TorchRec's collections, and how rows are looked up in them.

Tables may be sharded row-wise, sharded in another way, or not at all; callers of `Tables` need not know which.

B = ids, V = valid ones of them, L = bags of any length, I = ids in them, D = dim of a set's inherent features together,
R = rows of a small table, d = its dim.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torchrec import DataType, EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor, PoolingType
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import Awaitable

from embeddings.distributed.collectives import codecs_of, max_over_ranks
from embeddings.distributed.lookups import ShardedRows, ShardedWeightedPooling, WeightedBags, all_gathered_tables
from embeddings.distributed.row_wise import is_row_wise
from embeddings.sizes import DataSizes
from embeddings.tables.specs import TableSpec, declare_tables
from schemas.model import CROSS, INHERENT, Feature, ModelSettings, Precision, TableSet

DATA_TYPES: dict[Precision, DataType] = {"fp32": DataType.FP32, "fp16": DataType.FP16}

INITIAL_DEVIATION = 0.01
"""Standard deviation of a table's first values (the authors' code: every weight but biases ~ N(0, 0.01^2))."""


CrossRows = Mapping[str, Mapping[Feature, Tensor]]
"""All rows of the cross tables of one set: by sequence, then by feature; float32 (R, d) each."""

AllCrossRows = Mapping[str, CrossRows]
"""All rows of the cross tables of every set: by set, then as `CrossRows`."""


class Tables(nn.Module):
    """All tables of a model, in `EmbeddingBagCollection`s that TorchRec can shard.

    - Inherent features (item, category): one collection for each set of tables, looked up by id.
    - Cross features (position, interval, behavior, scene): one collection for all sets. These tables are small, so a
      step looks up all their rows at once and indexes the result. That leaves their optimizer, sharding and checkpoint
      to TorchRec, as for all others.
    """

    def __init__(
        self, settings: ModelSettings, sizes: DataSizes, sets: Mapping[str, TableSet], device: torch.device
    ) -> None:
        super().__init__()
        specs = declare_tables(settings, sizes, sets)
        self.specs = {spec.name: spec for spec in specs}
        """Every table's spec, by name."""
        # Names are for TorchRec and for checkpoints. Within the program a table is found by its identity, and no name
        # is parsed.
        self._by_identity = {(spec.set, spec.feature, spec.sequence): spec for spec in specs}
        self.sets = tuple(sets)
        self.inherent_features = tuple(feature for feature in INHERENT if feature in settings.features)
        self.cross_features = tuple(feature for feature in CROSS if feature in settings.features)
        self.sequences = tuple(settings.retrieved)
        self.codecs = codecs_of(settings.communication)
        """How floats travel between ranks."""
        self.inherent = nn.ModuleDict()
        # A collection for each set, because every lookup is of one set alone.
        for name in sets:
            configs = [_config(spec) for spec in specs if spec.inherent and spec.set == name]
            self.inherent[name] = EmbeddingBagCollection(configs, device=device)
        self._cross_specs = [spec for spec in specs if not spec.inherent]
        self.cross = None
        if self._cross_specs:
            self.cross = EmbeddingBagCollection([_config(spec) for spec in self._cross_specs], device=device)

    def spec(self, name: str, feature: Feature, sequence: str | None = None) -> TableSpec:
        """The table of ``feature`` in set ``name``; a cross feature has one for each sequence."""
        return self._by_identity[name, feature, sequence]

    def weights(self) -> Iterator[tuple[TableSpec, nn.Parameter]]:
        """The spec and the rows of each table; before sharding only."""
        for collection in (*self.inherent.values(), *([self.cross] if self.cross else [])):
            assert isinstance(collection, EmbeddingBagCollection)
            for name, bags in collection.embedding_bags.items():
                yield self.specs[name], bags.weight

    def inherent_dims(self, name: str) -> dict[Feature, int]:
        """Dims of the inherent features in set ``name``, in the order in which a row concatenates them."""
        return {feature: self.spec(name, feature).dim for feature in self.inherent_features}

    def cross_dims(self, name: str) -> dict[Feature, int]:
        """Dims of the cross features in set ``name``; they are the same in all sequences."""
        return {feature: self.spec(name, feature, self.sequences[0]).dim for feature in self.cross_features}

    def inherent_rows(self, name: str, ids: Mapping[Feature, Tensor], valid_B: Tensor) -> Tensor:
        """Rows of the inherent features, concatenated; with gradient. Every rank must call it.

        Args:
            name: the set of tables.
            ids: for each inherent feature, int32 (B,).
            valid_B: bool; where False nothing is looked up, and the row is 0.

        Returns:
            float32 (B, D).
        """
        # Padding is not looked up: it would read row 0, the unknown id, and give it a gradient.
        index_V = valid_B.nonzero().flatten()
        valid_ids = {feature: ids[feature].index_select(0, index_V) for feature in self.inherent_features}
        rows_VD: Tensor
        if self.row_wise(name):
            # Made anew each time, since sharding puts other collections in the place of these after the model was
            # built. Tables in fp16 give rows in fp16; all that follows computes in float32.
            rows_VD = ShardedRows(self.inherent[name], self.codecs)(valid_ids).wait().float()
        else:
            rows_VD = self._bags_of_one(name, valid_ids)
        if len(rows_VD) == len(valid_B):
            return rows_VD
        # Padding gets rows of 0, through which no gradient passes.
        zeros_BD = rows_VD.new_zeros(len(valid_B), rows_VD.shape[1])
        return zeros_BD.index_copy(0, index_V, rows_VD)

    def _bags_of_one(self, name: str, ids: Mapping[Feature, Tensor]) -> Tensor:
        """Rows of ids, looked up by the collection itself as bags of one; it need not be sharded."""
        count, device = len(ids["item"]), ids["item"].device
        sharded = isinstance(self.inherent[name], ShardedEmbeddingBagCollection)
        # Gloo's collectives need as many bags on all ranks. At least one bag, if an empty one: without any, no gradient
        # would pass, and other ranks would wait in the backward pass.
        bags = max(1, max_over_ranks([count], device)[0] if sharded else count)
        # Bags of one for the ids, then empty bags up to the rank that has most.
        lengths = torch.zeros(bags, dtype=torch.int32, device=device)
        lengths[:count] = 1
        features = KeyedJaggedTensor(
            keys=list(self.inherent_features),
            values=torch.cat(list(ids.values())),
            lengths=lengths.repeat(len(self.inherent_features)),
        )
        return _side_by_side(self.inherent[name], features, self.inherent_features)[:count]

    def row_wise(self, name: str) -> bool:
        """Whether the rows of set ``name`` are spread over ranks, so that shards can search and pool them."""
        return is_row_wise(self.inherent[name])

    def pooled_rows(self, name: str, ids: Mapping[Feature, Tensor], weight_I: Tensor, length_L: Tensor) -> Tensor:
        """Weighted sums of rows of the inherent features, concatenated; made on the shards. Every rank must call it.

        Args:
            name: the set of tables, sharded row-wise.
            ids: for each inherent feature, int32 (I,): the first bag's, the second's, ...
            weight_I: float32, may require a gradient.
            length_L: int32 or int64, ids of each of L bags.

        Returns:
            float32 (L, D).
        """
        pooling = ShardedWeightedPooling(self.inherent[name], self.codecs)
        # The order in which a row concatenates the features, whatever the order in ``ids``.
        in_order: dict[str, Tensor] = {feature: ids[feature] for feature in self.inherent_features}
        sums_LD: Tensor = pooling(WeightedBags(in_order, weight_I, length_L)).wait()
        return sums_LD.float()

    def cross_rows(self, device: torch.device) -> AllCrossRows:
        """All rows of all cross tables, looked up with ids on ``device``; every rank must call it."""
        # Every set and sequence has an entry, also without cross features, so that nobody who reads them needs a
        # branch.
        by_set: dict[str, dict[str, dict[Feature, Tensor]]] = {
            name: {sequence: {} for sequence in self.sequences} for name in self.sets
        }
        if self.cross is None:
            return by_set
        row_wise = is_row_wise(self.cross)
        # The branch depends on how the tables are sharded, which is the same on all ranks.
        tables = all_gathered_tables(self.cross) if row_wise else self._all_rows(self.cross, device)
        for spec in self._cross_specs:
            assert spec.sequence is not None
            by_set[spec.set][spec.sequence][spec.feature] = tables[spec.name][: spec.rows].float()
        return by_set

    def _all_rows(self, collection: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """All rows of each table, looked up by the collection itself and padded to the longest table."""
        counts = torch.tensor([spec.rows for spec in self._cross_specs], device=device)
        row_R = torch.arange(int(counts.max()), dtype=torch.int32, device=device)
        # A lookup wants as many bags of each table: row r is bag r, and bags behind a table's last row are empty.
        present = row_R < counts[:, None]
        features = KeyedJaggedTensor(
            keys=[spec.name for spec in self._cross_specs],
            values=row_R.expand_as(present)[present],
            lengths=present.flatten().to(torch.int32),
        )
        rows: dict[str, Tensor] = _looked_up(collection, features).to_dict()
        return rows


def _config(spec: TableSpec) -> EmbeddingBagConfig:
    """A table's declaration for TorchRec; a cross table's only lookup is keyed by its own name."""
    return EmbeddingBagConfig(
        name=spec.name,
        # The cross tables of all sets and sequences share a collection, where "position" alone would name several of
        # them.
        feature_names=[spec.feature if spec.inherent else spec.name],
        num_embeddings=spec.rows,
        embedding_dim=spec.dim,
        data_type=DATA_TYPES[spec.settings.precision],
        pooling=PoolingType.SUM,
        init_fn=partial(nn.init.normal_, std=INITIAL_DEVIATION),
    )


def _looked_up(collection: nn.Module, features: KeyedJaggedTensor) -> KeyedTensor:
    rows = collection(features)
    # A sharded collection returns an awaitable, an unsharded one the rows.
    return rows.wait() if isinstance(rows, Awaitable) else rows


def _side_by_side(collection: nn.Module, features: KeyedJaggedTensor, order: Sequence[str]) -> Tensor:
    """The rows of a lookup in the given order of features; a sharded collection has an order of its own."""
    rows = _looked_up(collection, features)
    values: Tensor = rows.values() if rows.keys() == list(order) else torch.cat([rows[key] for key in order], dim=1)
    return values.float()
