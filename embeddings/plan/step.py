"""How long a training step takes, phase by phase, with search on the shard and with search at home.

Times are sums: nothing is taken to overlap. Counts are means, so a step of real ranks waits for the unluckiest of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from embeddings.model import CtrModel
from embeddings.plan.tables import PlannedTable
from embeddings.plan.traffic import (
    FLOAT,
    PHASES,
    Phase,
    Traffic,
    dense_gradients,
    found_on_shard,
    lookup,
    pooling_on_shard,
    search_on_shard,
)
from embeddings.plan.workload import Search, Workload
from schemas.cluster import ClusterSettings

PASSES = 10
"""Times that rows of what was retrieved are read or written by attention and pooling, both ways."""

PAIR_PASSES = 3
"""Times that category rows of (target, behaviour) pairs are read or written on a shard."""

COPIES = 3
"""Times that rows are copied at home after a lookup."""


@dataclass(frozen=True)
class Cost:
    """Of one part of a step, on a rank."""

    phase: Phase
    what: str
    within_node: float
    """Bytes that a rank sends to ranks of its node."""
    between_nodes: float
    """Bytes that it sends to ranks of other nodes."""
    ms: float


@dataclass(frozen=True)
class StepEstimate:
    """A step of a rank."""

    search: Search
    targets: int
    costs: tuple[Cost, ...]

    @property
    def ms(self) -> float:
        """Milliseconds."""
        return sum(cost.ms for cost in self.costs)

    @property
    def sent(self) -> float:
        """Bytes that a rank sends."""
        return sum(cost.within_node + cost.between_nodes for cost in self.costs)

    @property
    def bytes_per_sample(self) -> float:
        """Bytes that a rank sends for each of its targets."""
        return self.sent / self.targets

    def phases(self) -> dict[Phase, Cost]:
        """Costs added up by phase, in the order of a step."""
        return {
            phase: Cost(
                phase,
                "",
                sum(cost.within_node for cost in self.costs if cost.phase == phase),
                sum(cost.between_nodes for cost in self.costs if cost.phase == phase),
                sum(cost.ms for cost in self.costs if cost.phase == phase),
            )
            for phase in PHASES
        }


def pools_on_shards(model: CtrModel) -> bool:
    """Whether search on the shard lets the model pool there too: not the rows that attention brings home anyway."""
    roles = model.roles
    representation = {roles.target_representation, roles.history_representation}
    return len(representation) == 1 and not representation & {roles.target_attention, roles.history_attention}


class StepModel:
    """Estimates the steps of one model on one cluster.

    Args:
        model: on the meta device.
        tables: its tables, as they are planned.
        work: of a rank.
        cluster: the machines.
    """

    def __init__(
        self, model: CtrModel, tables: Sequence[PlannedTable], work: Workload, cluster: ClusterSettings
    ) -> None:
        self._model, self._work, self._cluster = model, work, cluster
        self._inherent = {
            name: [table for table in tables if table.set == name and table.inherent] for name in model.tables.inherent
        }
        self._cross = [table for table in tables if not table.inherent]
        self._whole = model.auxiliary is not None
        dense = [(name, weight) for name, weight in model.named_parameters() if ".embedding_bags." not in name]
        self.dense_parameters = sum(weight.numel() for _, weight in dense)
        self.inputs = model._inputs() * (2 if self._whole else 1)

    def estimate(self, search: Search) -> StepEstimate:
        """A step with search on the shard or at home."""
        costs = [
            *self._cross_rows(),
            *(self._search_at_home() if search == "home" else self._search_on_shard()),
            *self._winners(search),
            *self._dense(),
            Cost("step", "whatever its size", 0, 0, self._cluster.costs.step / 1e6),
        ]
        return StepEstimate(search, self._work.targets, tuple(costs))

    def search_bytes(self, search: Search) -> float:
        """Device memory of the search's rows and scores, beside the tables' own buffers."""
        behaviors, pairs = self._work.behaviors, self._work.pairs
        if search == "shard":
            return behaviors * 32 + pairs * 24
        dim = self._dim(self._model.roles.history_attention)
        return behaviors * dim * FLOAT * COPIES + pairs * 24

    def _cross_rows(self) -> Iterator[Cost]:
        """All rows of all cross tables."""
        if self._cross:
            bags = max(table.rows for table in self._cross)
            ids = sum(table.rows for table in self._cross) / len(self._cross)
            yield from self._lookup("cross tables", self._cross, bags, ids, gradient=True)

    def _search_at_home(self) -> Iterator[Cost]:
        """All behaviours' rows come home (`embeddings.search.home`)."""
        roles, work, costs = self._model.roles, self._work, self._cluster.costs
        together = roles.target_attention == roles.history_attention
        ids = work.behaviors + work.targets * together
        history = self._inherent[roles.history_attention]
        yield from self._lookup("behaviours", history, work.history_bags, ids, gradient=False)
        if not together:
            targets = self._inherent[roles.target_attention]
            yield from self._lookup("targets", targets, work.history_bags, work.targets, gradient=False)
        dim = self._dim(roles.history_attention)
        yield self._compute("search", "scores of all behaviours", self._scores(dim, costs.pair))

    def _search_on_shard(self) -> Iterator[Cost]:
        """Ids go out, scores come back (`embeddings.search.on_shard`)."""
        roles, work, costs = self._model.roles, self._work, self._cluster.costs
        tables = self._inherent[roles.history_attention]
        categories = next((table.rows for table in tables if table.feature == "category"), 1)
        for traffic in search_on_shard(tables, self._model.settings.features, work, categories):
            yield self._sent(traffic)
        by_feature = {table.feature: table for table in tables}
        item = by_feature["item"]
        scan = work.behaviors * (costs.row + item.row_bytes / self._bandwidth) + self._scores(item.dim, costs.scan)
        yield self._compute("search", "scores of the behaviours here", scan)
        if "category" in by_feature:
            categories_rows = work.pairs * by_feature["category"].dim * FLOAT * PAIR_PASSES / self._bandwidth
            yield self._compute("search", "scores of categories", categories_rows)
        merged = sum(
            work.targets * work.ranks * found_on_shard(sequence.pairs / work.targets, sequence.retrieved, work.ranks)
            for sequence in work.sequences
        )
        yield self._compute("search", "merging", merged * costs.pair)

    def _scores(self, dim: int, pair: float) -> float:
        """Nanoseconds of scoring all pairs."""
        crosses = len(self._model.tables.cross_features)
        return self._work.pairs * (2 * dim / self._rate + pair + crosses * self._cluster.costs.cross)

    def _winners(self, search: Search) -> Iterator[Cost]:
        """Targets and what was retrieved, with gradient (`embeddings.lookup`, `embeddings.pooled_lookup`)."""
        roles, work = self._model.roles, self._work
        targets = {roles.target_attention, roles.target_representation}
        history = {roles.history_attention, roles.history_representation}
        bags = work.history_bags if self._whole else work.winner_bags
        behaviors = work.behaviors if self._whole else work.kept
        for name in sorted(targets | history):
            if search == "shard" and pools_on_shards(self._model) and name == roles.history_representation:
                yield from self._pooling(f"histories, {name}", self._inherent[name])
                continue
            ids = behaviors * (name in history) + work.targets * (name in targets)
            yield from self._lookup(f"winners, {name}", self._inherent[name], bags, ids, gradient=True)

    def _pooling(self, what: str, tables: Sequence[PlannedTable]) -> Iterator[Cost]:
        work = self._work
        bags, ids = work.pooled_bags, work.kept + work.targets
        for traffic in pooling_on_shard(what, tables, bags, ids, work.ranks):
            yield self._sent(traffic)
        yield self._rows_here(what, tables, bags, ids, gradient=True)

    def _dense(self) -> Iterator[Cost]:
        """Attention, pooling, prediction, and the gradients of the dense parameters."""
        work, costs = self._work, self._cluster.costs
        kept = work.pairs if self._whole else work.kept
        crosses = sum(table.dim for table in self._cross)
        dim = sum(self._dim(name) for name in self._inherent) + crosses / max(1, len(work.sequences))
        attended = kept * dim * FLOAT * PASSES / self._bandwidth
        yield self._compute("dense", "attention and pooling", attended)
        products = 3 * 2 * self.dense_parameters * work.targets / self._rate
        inputs = self.inputs * work.targets * costs.input
        yield self._compute("dense", "prediction", products + inputs)
        for traffic in dense_gradients(self.dense_parameters, self.inputs, work.ranks):
            yield self._sent(traffic)

    def _lookup(
        self, what: str, tables: Sequence[PlannedTable], bags: float, ids: float, gradient: bool
    ) -> Iterator[Cost]:
        for traffic in lookup(what, tables, bags, ids, self._work.ranks, gradient):
            yield self._sent(traffic)
        yield self._rows_here(what, tables, bags, ids, gradient)

    def _rows_here(self, what: str, tables: Sequence[PlannedTable], bags: float, ids: float, gradient: bool) -> Cost:
        """Reading rows on the shards, writing them back, and copying the answer at home."""
        ranks = self._work.ranks
        owned: dict[int, float] = {}
        everywhere = 0.0
        for table in tables:
            if table.sharding_type == "row_wise":
                everywhere += self._shard_ns(table, bags * ranks, ids, gradient)
            else:
                there = self._shard_ns(table, bags * ranks, ids * ranks, gradient)
                owned[table.ranks[0]] = owned.get(table.ranks[0], 0) + there
        home = bags * sum(table.dim for table in tables) * FLOAT * COPIES * (1 + gradient) / self._bandwidth
        return self._compute("lookups", what, everywhere + max(owned.values(), default=0) + home)

    def _shard_ns(self, table: PlannedTable, bags: float, ids: float, gradient: bool) -> float:
        """Nanoseconds of a lookup on the rank that has the rows."""
        costs = self._cluster.costs
        bandwidth = min(self._cluster.host_link, self._bandwidth) if table.on_host else self._bandwidth
        answer = 2 * bags * table.dim * FLOAT / self._bandwidth
        forwards = ids * (costs.row + table.row_bytes / bandwidth) + bags * costs.bag + answer
        if not gradient:
            return forwards
        return forwards + ids * (costs.update + 2 * table.row_bytes / bandwidth) + bags * costs.bag + answer

    def _sent(self, traffic: Traffic) -> Cost:
        cluster = self._cluster
        neighbours = min(cluster.devices_per_node, cluster.ranks) - 1
        strangers = cluster.ranks - 1 - neighbours
        share = 1.0 if traffic.collective == "all_to_all" else getattr(cluster.collectives, traffic.collective)
        link = cluster.between_nodes if strangers else cluster.within_node
        us = traffic.collectives * link.latency
        # Both links are busy at the same time.
        us += (
            traffic.busiest
            / share
            / 1e3
            * max(neighbours / cluster.within_node.bandwidth, strangers / cluster.between_nodes.bandwidth)
        )
        alone = cluster.ranks == 1
        return Cost(
            traffic.phase,
            traffic.what,
            traffic.to_each * neighbours,
            traffic.to_each * strangers,
            0.0 if alone else us / 1e3,
        )

    def _compute(self, phase: Phase, what: str, ns: float) -> Cost:
        return Cost(phase, what, 0, 0, ns / 1e6)

    def _dim(self, name: str) -> int:
        return sum(self._model.tables.inherent_dims(name).values())

    @property
    def _bandwidth(self) -> float:
        """Bytes/ns."""
        return self._cluster.memory_bandwidth

    @property
    def _rate(self) -> float:
        """Floating-point operations a nanosecond."""
        return self._cluster.dense_rate * 1e3
