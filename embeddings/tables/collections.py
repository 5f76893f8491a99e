"""The embedding tables of a model in TorchRec's collections, and how rows are looked up in them.

Tables may be sharded row-wise, sharded in another way, or not at all; callers of `Tables` need not know which.

B = ids, E = entries of bags, D = dim of a set's inherent features together, R = rows of a small table, d = dim of a
table, L = rows looked up.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, pad
from torch.profiler import record_function
from torchrec import DataType, EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor, PoolingType
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import Awaitable

from embeddings.batch import Bags, Batch, DistinctBags
from embeddings.distributed.collectives import codecs_of, max_over_ranks
from embeddings.distributed.lookups import RowsOfIds, WeightedBags, all_gathered_tables, sharded_rows, sharded_sums
from embeddings.distributed.row_wise import is_row_wise
from embeddings.sizes import DataSizes
from embeddings.tables.specs import CONTEXT, TableRoles, TableSpec, declare_tables
from schemas.errors import UserError
from schemas.model import Feature, ModelSettings, Precision

DATA_TYPES: dict[Precision, DataType] = {"fp32": DataType.FP32, "fp16": DataType.FP16}

INITIAL_DEVIATION = 0.01
"""Standard deviation of a table's first values (the authors' code: every weight but biases ~ N(0, 0.01^2))."""


CrossRows = Mapping[str, Mapping[Feature, Tensor]]
"""All rows of the cross tables of one set: by sequence, then by feature; float32 (R, d) each."""


@dataclass(frozen=True)
class SmallRows:
    """All rows of the small tables, on every rank, with gradient."""

    cross: Mapping[str, CrossRows]
    """By set: the cross features'."""
    inherent: Mapping[str, Mapping[Feature, Tensor]]
    """By set: those of inherent features whose table is small enough (`TableSpec.gathered`), float32 (R, d) each."""


class Tables(nn.Module):
    """All tables of a model, in `EmbeddingBagCollection`s that TorchRec can shard.

    - Inherent features (item, and what belongs to items): one collection for each set of tables, looked up by id.
    - Cross features (position, interval, and what belongs to behaviours): one collection for all sets.
    - Context (what belongs to users and impressions): one collection, sharded as the planner likes.

    Small tables, which are those of cross features and of the inherent ones that have few values, are looked up as a
    whole: a step gathers all their rows at once and indexes the result. That leaves their optimizer, sharding and
    checkpoint to TorchRec, as for all others.
    """

    def __init__(self, settings: ModelSettings, sizes: DataSizes, roles: TableRoles, device: torch.device) -> None:
        super().__init__()
        self.sides = sizes.sides(settings)
        """The features, by what they belong to."""
        specs = declare_tables(settings, sizes, self.sides, roles)
        self.specs = {spec.name: spec for spec in specs}
        """Every table's spec, by name."""
        # Names are for TorchRec and for checkpoints. Within the program a table is found by its identity, and no name
        # is parsed.
        if len(self.specs) < len(specs):
            names = [spec.name for spec in specs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(
                f"model.features: two tables would be called {twice}; give a feature or a sequence another name"
            )
        self._by_identity = {(spec.set, spec.feature, spec.sequence): spec for spec in specs}
        self.sets = tuple(roles.sets(settings))
        self._scored_alone = {name: roles.scored_alone(name) for name in self.sets}
        self.sequences = tuple(settings.retrieved)
        self.codecs = codecs_of(settings.communication)
        """How floats travel between ranks."""
        self.inherent = nn.ModuleDict()
        # A collection for each set, because every lookup is of one set alone.
        for name in self.sets:
            configs = [_config(spec) for spec in specs if spec.inherent and spec.set == name]
            self.inherent[name] = EmbeddingBagCollection(configs, device=device)
        self._cross_specs = [spec for spec in specs if spec.kind == "cross"]
        self.cross = None
        if self._cross_specs:
            self.cross = EmbeddingBagCollection([_config(spec) for spec in self._cross_specs], device=device)
        self.context = None
        if self.sides.context:
            configs = [_config(spec) for spec in specs if spec.kind == "context"]
            self.context = EmbeddingBagCollection(configs, device=device)

    def spec(self, name: str, feature: Feature, sequence: str | None = None) -> TableSpec:
        """The table of ``feature`` in set ``name``; a cross feature has one for each sequence."""
        return self._by_identity[name, feature, sequence]

    def weights(self) -> Iterator[tuple[TableSpec, nn.Parameter]]:
        """The spec and the rows of each table; before sharding only."""
        for collection in (*self.inherent.values(), self.cross, self.context):
            if collection is None:
                continue
            assert isinstance(collection, EmbeddingBagCollection)
            for name, bags in collection.embedding_bags.items():
                yield self.specs[name], bags.weight

    def inherent_features(self, name: str, scored: bool = False) -> tuple[Feature, ...]:
        """The inherent features of set ``name``; ``scored``: those of them that behaviours are scored by."""
        return self.sides.inherent_of(scored or self._scored_alone[name])

    def cross_features(self, name: str, scored: bool = False) -> tuple[Feature, ...]:
        """The cross features of set ``name``; ``scored``: those of them that behaviours are scored by."""
        return self.sides.cross_of(scored or self._scored_alone[name])

    def inherent_dims(self, name: str, scored: bool = False) -> dict[Feature, int]:
        """Dims of the inherent features in set ``name``, in the order in which a row concatenates them."""
        return {feature: self.spec(name, feature).dim for feature in self.inherent_features(name, scored)}

    def cross_dims(self, name: str, scored: bool = False) -> dict[Feature, int]:
        """Dims of the cross features in set ``name``; they are the same in all sequences."""
        first = self.sequences[0]
        return {feature: self.spec(name, feature, first).dim for feature in self.cross_features(name, scored)}

    @property
    def context_inputs(self) -> int:
        """Floats that `context_rows` returns for a target."""
        dims = [self.spec(CONTEXT, feature).dim for feature in self.sides.context]
        return sum(dims) + len(self.sides.context_numbers)

    def inherent_rows(
        self,
        name: str,
        ids: Mapping[Feature, Tensor],
        valid_B: Tensor | None,
        small: SmallRows,
        bags: Mapping[Feature, Bags] = MappingProxyType({}),
    ) -> dict[Feature, RowsOfIds]:
        """Rows of inherent features, with gradient. Every rank must call it.

        Args:
            name: the set of tables.
            ids: for each inherent feature of the set, or some of them if it is row-wise, int32 (B,); of a feature with
                several values, numbers of bags.
            valid_B: bool; where False nothing is looked up, and the row is any; None: all are valid.
            small: all rows of the small tables.
            bags: of the data set.

        Returns:
            By feature, in the order of ``ids``; of a feature with several values, the rows of the bags' ids, which are
            yet to be pooled.
        """
        asked, distinct = dict(ids), dict[Feature, DistinctBags]()
        for feature in self.sides.bags & ids.keys():
            # What is not valid stands for the empty bag, so that no row is touched for it.
            number_B = ids[feature] if valid_B is None else torch.where(valid_B, ids[feature], 0)
            distinct[feature] = bags[feature].distinct(number_B)
            asked[feature] = distinct[feature].id_E
        # Small tables are here as a whole: an index is all that is needed.
        here = small.inherent[name]
        rows = {f: RowsOfIds(rows_Rd, asked[f].long(), None) for f, rows_Rd in here.items() if f in asked}
        others = {feature: id_B for feature, id_B in asked.items() if feature not in rows}
        if self.row_wise(name):
            rows |= sharded_rows(self.inherent[name], others, valid_B, self.codecs, distinct) if others else {}
        else:
            rows |= self._bags_of_one(name, others, valid_B, distinct)
        return {feature: rows[feature]._replace(bags=distinct.get(feature)) for feature in ids}

    def _bags_of_one(
        self, name: str, ids: Mapping[Feature, Tensor], valid_B: Tensor | None, all_valid: Collection[Feature]
    ) -> dict[Feature, RowsOfIds]:
        """Rows of ids, looked up by the collection itself as bags of one; it need not be sharded."""
        device = ids["item"].device
        sharded = isinstance(self.inherent[name], ShardedEmbeddingBagCollection)
        valid = {feature: None if feature in all_valid else valid_B for feature in ids}
        counts = list(map(len, ids.values()))
        # Gloo's collectives need as many bags on all ranks. At least one bag, if an empty one: without any, no gradient
        # would pass, and other ranks would wait in the backward pass.
        bags = max(1, *(max_over_ranks(counts, device) if sharded else counts))
        # Bags of one for the ids, empty ones for those that are not valid, and empty bags up to the most that there are
        # of any feature on any rank.
        lengths = torch.zeros(len(ids), bags, dtype=torch.int32, device=device)
        for number, (count, valid_of) in enumerate(zip(counts, valid.values(), strict=True)):
            lengths[number, :count] = 1 if valid_of is None else valid_of.to(torch.int32)
        features = KeyedJaggedTensor(
            keys=list(ids),
            values=torch.cat([id_B if (of := valid[feature]) is None else id_B[of] for feature, id_B in ids.items()]),
            lengths=lengths.flatten(),
        )
        rows = _looked_up(self.inherent[name], features).to_dict()
        # A bag behind the last id stays, empty: there is at least one row, as callers expect.
        return {
            feature: RowsOfIds(
                rows[feature].float(), torch.arange(len(id_B), device=device), pad(id_B, (0, bags - len(id_B)))
            )
            for feature, id_B in ids.items()
        }

    @record_function("dare/lookups")
    def context_rows(self, batch: Batch) -> list[Tensor]:
        """What is known of users and of what was shown: (T, d) for each feature with a table, (T, 1) for each number.

        Every rank must call it, and go through its backward pass. A user's rows are looked up once.
        """
        return [*self._context_rows(batch), *(self._of_targets(batch, name) for name in self.sides.context_numbers)]

    def _of_targets(self, batch: Batch, number: Feature) -> Tensor:
        of_users = number in self.sides.of_users
        return (batch.features_U[number][batch.user_T] if of_users else batch.features_T[number])[:, None]

    def _context_rows(self, batch: Batch) -> list[Tensor]:
        if self.context is None:
            return []
        columns = {
            feature: batch.features_U[feature] if feature in self.sides.of_users else batch.features_T[feature]
            for feature in self.sides.context
        }
        device, counts = batch.item_T.device, [*map(len, columns.values())]
        sharded = isinstance(self.context, ShardedEmbeddingBagCollection)
        # As many bags on all ranks, and at least one: see `_bags_of_one`.
        most = max(1, *(max_over_ranks(counts, device) if sharded else counts))
        lengths, values = torch.zeros(len(columns), most, dtype=torch.int32, device=device), list[Tensor]()
        for number, (feature, column_X) in enumerate(columns.items()):
            if feature in self.sides.bags:
                lengths[number, : len(column_X)], id_E = batch.bags[feature].each(column_X)
            else:
                lengths[number, : len(column_X)], id_E = 1, column_X
            values.append(id_E)
        features = KeyedJaggedTensor(keys=list(columns), values=torch.cat(values), lengths=lengths.flatten())
        rows = _looked_up(self.context, features).to_dict()
        found = []
        for number, feature in enumerate(columns):
            # A bag's row is the mean of its rows, of which the lookup has made the sum.
            mean_Xd = rows[feature].float() / lengths[number].clamp(min=1)[:, None]
            index_T = batch.user_T if feature in self.sides.of_users else torch.arange(len(batch), device=device)
            found.append(embedding(index_T, mean_Xd))
        return found

    def row_wise(self, name: str) -> bool:
        """Whether the rows of set ``name`` are spread over ranks, so that shards can search and pool them."""
        return is_row_wise(self.inherent[name])

    def ranks(self, name: str) -> int:
        """Over how many ranks a sharded set is spread."""
        collection = self.inherent[name]
        assert isinstance(collection, ShardedEmbeddingBagCollection)
        ranks: int = collection._env.world_size
        return ranks

    def pooled_rows(self, name: str, bags: WeightedBags) -> dict[Feature, Tensor]:
        """Weighted sums of inherent features' rows, (bags, d) by feature; made on the shards. Every rank must call it.

        Args:
            name: the set of tables, sharded row-wise.
            bags: of ids of those features whose tables are not small.
        """
        return sharded_sums(self.inherent[name], bags, self.codecs)

    @record_function("dare/lookups")
    def small_rows(self, device: torch.device) -> SmallRows:
        """All rows of all small tables, looked up with ids on ``device``; every rank must call it."""
        # Every set and sequence has an entry, also without cross features, so that nobody who reads them needs a
        # branch.
        cross: dict[str, dict[str, dict[Feature, Tensor]]] = {
            name: {sequence: {} for sequence in self.sequences} for name in self.sets
        }
        inherent: dict[str, dict[Feature, Tensor]] = {name: {} for name in self.sets}
        # The branches depend on how the tables are sharded, which is the same on all ranks.
        gathered: dict[str, list[str]] = {
            name: [spec.feature for spec in self.specs.values() if spec.set == name and spec.inherent and spec.gathered]
            for name in self.sets
            if self.row_wise(name)
        }
        collections: list[tuple[nn.Module, list[str]]] = [
            (self.inherent[name], features) for name, features in gathered.items() if features
        ]
        together = is_row_wise(self.cross)
        if self.cross is not None and together:
            collections.append((self.cross, [spec.name for spec in self._cross_specs]))
        # One exchange for all of them.
        tables = all_gathered_tables(collections) if collections else []
        for name, of_set in zip([name for name, features in gathered.items() if features], tables, strict=False):
            inherent[name] = dict(of_set)
        if self.cross is not None:
            of_cross = tables[-1] if together else self._all_rows(self.cross, device)
            for spec in self._cross_specs:
                assert spec.sequence is not None
                cross[spec.set][spec.sequence][spec.feature] = of_cross[spec.name][: spec.rows].float()
        return SmallRows(cross, inherent)

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
        feature_names=[spec.name if spec.kind == "cross" else spec.feature],
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
