"""The embedding tables of a model: attention and representation, and how rows are looked up in them.

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
from schemas.model import CROSS, INHERENT, Feature, ModelSettings, Precision, Table, TableSet

DATA_TYPES: dict[Precision, DataType] = {"fp32": DataType.FP32, "fp16": DataType.FP16}

INITIAL_DEVIATION = 0.01
"""Standard deviation of a table's first values (the authors' code: every weight but biases ~ N(0, 0.01^2))."""


CrossRows = Mapping[str, Mapping[Feature, Tensor]]
"""All rows of a set's cross tables: by sequence, by feature; float32 (R, d) each."""

AllCrossRows = Mapping[str, CrossRows]
"""The same by set."""


class Tables(nn.Module):
    """All tables of a model, in `EmbeddingBagCollection`s that TorchRec can shard.

    ``sets`` maps the name of each set of tables to its settings; DARE has the two sets ``attention`` and
    ``representation``, TWIN one. A set has a table for each feature:

    - inherent features (item, category): table ``{feature}_{set}``, one collection a set, looked up by id;
    - cross features (position, interval, behavior, scene): table ``{sequence}_{feature}_{set}``. They are small, so a
      step looks up all their rows at once, in one collection, and indexes the result. That leaves their
      optimizer, sharding and checkpoint to TorchRec, as for all others.
    """

    def __init__(
        self, settings: ModelSettings, sizes: DataSizes, sets: Mapping[str, TableSet], device: torch.device
    ) -> None:
        super().__init__()
        self.inherent_features = tuple(feature for feature in INHERENT if feature in settings.features)
        self.cross_features = tuple(feature for feature in CROSS if feature in settings.features)
        self.sequences = tuple(settings.retrieved)
        self.codecs = codecs_of(settings.communication)
        """Of floats on their way between ranks."""
        self._sets = dict(sets)
        self._settings_of: dict[str, Table] = {}
        self.inherent = nn.ModuleDict()
        for name, tables in sets.items():
            inherent = [
                self._config(f"{feature}_{name}", feature, tables.table(feature), sizes.rows(feature))
                for feature in self.inherent_features
            ]
            self.inherent[name] = EmbeddingBagCollection(inherent, device=device)
        self._rows = {
            table: (sizes.rows(feature, sequence), sequence, feature, name)
            for name in sets
            for sequence in self.sequences
            for feature in self.cross_features
            for table in [f"{sequence}_{feature}_{name}"]
        }
        cross = [
            self._config(table, table, sets[name].table(feature), rows)
            for table, (rows, _, feature, name) in self._rows.items()
        ]
        self.cross = EmbeddingBagCollection(cross, device=device) if cross else None

    def _config(self, name: str, feature: str, table: Table, rows: int) -> EmbeddingBagConfig:
        self._settings_of[name] = table
        return EmbeddingBagConfig(
            name=name,
            feature_names=[feature],
            num_embeddings=rows,
            embedding_dim=table.dim,
            data_type=DATA_TYPES[table.precision],
            pooling=PoolingType.SUM,
            init_fn=partial(nn.init.normal_, std=INITIAL_DEVIATION),
        )

    def weights(self) -> Iterator[tuple[str, Table, nn.Parameter]]:
        """Name, settings and rows of each table; before sharding only."""
        for collection in (*self.inherent.values(), *([self.cross] if self.cross else [])):
            assert isinstance(collection, EmbeddingBagCollection)
            for name, bags in collection.embedding_bags.items():
                yield name, self._settings_of[name], bags.weight

    def inherent_dims(self, name: str) -> dict[Feature, int]:
        """Dims of the inherent features in set ``name``, in the order in which a row concatenates them."""
        return {feature: self._sets[name].table(feature).dim for feature in self.inherent_features}

    def cross_dims(self, name: str) -> dict[Feature, int]:
        """Dims of the cross features in set ``name``."""
        return {feature: self._sets[name].table(feature).dim for feature in self.cross_features}

    def inherent_rows(self, name: str, ids: Mapping[Feature, Tensor], valid_B: Tensor) -> Tensor:
        """Rows of the inherent features, concatenated; with gradient. Every rank must call it.

        Args:
            name: the set of tables.
            ids: for each inherent feature, int32 (B,).
            valid_B: bool; where False nothing is looked up, and the row is 0.

        Returns:
            float32 (B, D).
        """
        place_V = valid_B.nonzero().flatten()
        valid_ids = {feature: ids[feature].index_select(0, place_V) for feature in self.inherent_features}
        if self.row_wise(name):
            rows_VD = ShardedRows(self.inherent[name], self.codecs)(valid_ids).wait().float()
        else:
            rows_VD = self._bags_of_one(name, valid_ids)
        if len(rows_VD) == len(valid_B):
            return rows_VD
        return rows_VD.new_zeros(len(valid_B), rows_VD.shape[1]).index_copy(0, place_V, rows_VD)

    def _bags_of_one(self, name: str, ids: Mapping[Feature, Tensor]) -> Tensor:
        """A lookup in the collection itself, which need not be sharded."""
        count, device = len(ids["item"]), ids["item"].device
        sharded = isinstance(self.inherent[name], ShardedEmbeddingBagCollection)
        # Gloo's collectives need as many bags on all ranks.
        bags = max(1, max_over_ranks([count], device)[0] if sharded else count)
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
        in_order: dict[str, Tensor] = {feature: ids[feature] for feature in self.inherent_features}
        sums_LD: Tensor = pooling(WeightedBags(in_order, weight_I, length_L)).wait()
        return sums_LD.float()

    def cross_rows(self, device: torch.device) -> AllCrossRows:
        """All rows of all cross tables, looked up with the ids on ``device``."""
        found: dict[str, dict[str, dict[Feature, Tensor]]] = {
            name: {sequence: {} for sequence in self.sequences} for name in self._sets
        }
        if self.cross is None:
            return found
        whole = all_gathered_tables(self.cross) if is_row_wise(self.cross) else self._all_rows(self.cross, device)
        for table, (rows, sequence, feature, name) in self._rows.items():
            found[name][sequence][feature] = whole[table][:rows].float()
        return found

    def _all_rows(self, collection: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """A lookup of all rows in the collection itself, padded to the longest table."""
        counts = torch.tensor([rows for rows, _, _, _ in self._rows.values()], device=device)
        row_R = torch.arange(int(counts.max()), dtype=torch.int32, device=device)
        present = row_R < counts[:, None]
        features = KeyedJaggedTensor(
            keys=list(self._rows),
            values=row_R.expand_as(present)[present],
            lengths=present.flatten().to(torch.int32),
        )
        return _looked_up(collection, features).to_dict()


def _looked_up(collection: nn.Module, features: KeyedJaggedTensor) -> KeyedTensor:
    rows = collection(features)
    return rows.wait() if isinstance(rows, Awaitable) else rows


def _side_by_side(collection: nn.Module, features: KeyedJaggedTensor, order: Sequence[str]) -> Tensor:
    """The rows of a lookup in the given order of features; a sharded collection has an order of its own."""
    rows = _looked_up(collection, features)
    values: Tensor = rows.values() if rows.keys() == list(order) else torch.cat([rows[key] for key in order], dim=1)
    return values.float()
