"""How long a training step takes, phase by phase, with search on the shard and with search locally.

Times are sums: nothing is taken to overlap. Counts are means, so a step of real ranks waits for the unluckiest of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from embeddings.distributed.collectives import WIRE_BYTES
from embeddings.model import CtrModel
from embeddings.planning import dense_parameters, looks_up_all
from embeddings.workload import Search, Workload, distinct
from pipeline.planning.planned_tables import PlannedTable
from pipeline.planning.traffic import (
    BAG_IDS,
    FLOAT,
    PHASES,
    Phase,
    Traffic,
    all_rows,
    best_of_shard,
    context_lookup,
    dense_gradients,
    ids_of,
    pooling_on_shard,
    rows_lookup,
    search_on_shard,
)
from schemas.cluster import ClusterSettings

# Counts, not times: a calibration measures the figures of a cluster, never these. `dare bench plan` tells how far off
# the estimates are with them (docs/benchmarks.md).
PASSES = 10
"""Times that rows of what was retrieved are read or written by attention and pooling, both ways."""

PAIR_PASSES = 3
"""Times that category rows of (target, behaviour) pairs are read or written on a shard."""

TRAVEL_PASSES = 6
"""Times that a row that travels is read or written: taken out of what a shard returns, packed, unpacked."""

LOCAL_PASSES = 4
"""Times that a row is read or written on the sample's rank, where each id takes its row and features are put side by
side."""


@dataclass(frozen=True)
class Cost:
    """What one part of a step costs a rank."""

    phase: Phase
    what: str
    within_node: float
    """Bytes that a rank sends to ranks of its node."""
    between_nodes: float
    """Bytes that it sends to ranks of other nodes."""
    ms: float


@dataclass(frozen=True)
class StepEstimate:
    """What a training step costs a rank."""

    search: Search
    targets: int
    costs: tuple[Cost, ...]

    @property
    def ms(self) -> float:
        """Milliseconds."""
        return sum(cost.ms for cost in self.costs)

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in the step."""
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
        self._by_id = {
            name: [table for table in of_set if not table.gathered] for name, of_set in self._inherent.items()
        }
        self._small = [table for table in tables if table.gathered]
        self._cross = [table for table in tables if table.kind == "cross"]
        self._context = [table for table in tables if table.kind == "context"]
        self._looks_up_all = looks_up_all(model)
        self._wire = WIRE_BYTES[model.settings.communication]
        self._dense_parameters = dense_parameters(model)
        self._inputs = model.predicted_from

    def estimate(self, search: Search) -> StepEstimate:
        """A step with search on the shard or locally; the same where the model leaves no choice."""
        # Only some models can search on the shards; the others do the same whatever the settings say.
        search_place = search if self._model.searched == "shard" else "local"
        costs = [
            *self._small_rows(),
            *self._search(search_place),
            *self._selected(search_place),
            *self._of_context(),
            *self._dense(),
            Cost("step", "whatever its size", 0, 0, self._cluster.costs.step / 1e6),
        ]
        return StepEstimate(search, self._work.targets, tuple(costs))

    def _small_rows(self) -> Iterator[Cost]:
        """All rows of all small tables."""
        if self._small:
            for traffic in all_rows("small tables", self._small):
                yield self._sent(traffic)
            held = [max(table.shard_rows) for table in self._small]
            ns = self._on_shard(self._small, held, held, gradient=True)
            # Every rank copies the rows that all have sent, and adds up their gradients.
            copied = sum(table.rows * table.dim for table in self._small) * FLOAT * LOCAL_PASSES * 2
            yield self._compute("lookups", "small tables", ns + copied / self._bandwidth)

    def _search(self, search: Search) -> Iterator[Cost]:
        if self._model.searched == "ids":
            # Ids are compared, no rows: each pair costs what ranking it costs.
            yield self._compute("search", "ids of all behaviours", self._work.pairs * self._cluster.costs.pair)
        elif self._model.searched != "none":
            yield from self._search_locally() if search == "local" else self._search_on_shard()

    def _search_locally(self) -> Iterator[Cost]:
        """Search on the sample's rank, which fetches the rows of all behaviours (`embeddings.search.local`)."""
        roles, work, costs = self._model.roles, self._work, self._cluster.costs
        # With one set of tables for both, targets and behaviours are looked up together: one lookup, not two.
        together = roles.target_attention == roles.history_attention
        ids = work.behaviors + work.targets * together
        yield from self._lookup("behaviours", self._by_id[roles.history_attention], ids, ids, gradient=False)
        if not together:
            targets = self._by_id[roles.target_attention]
            yield from self._lookup("targets", targets, work.targets, work.targets, gradient=False)
        dim = self._dim(roles.history_attention, scored=True)
        yield self._compute("search", "scores of all behaviours", self._scores(dim, costs.pair))

    def _search_on_shard(self) -> Iterator[Cost]:
        """Search where the rows are: ids go out, scores come back (`embeddings.search.sharded`)."""
        roles, work, costs = self._model.roles, self._work, self._cluster.costs
        sides = self._model.tables.sides
        tables = [table for table in self._inherent[roles.history_attention] if table.feature in sides.scored]
        for traffic in search_on_shard(tables, sides.cross_of(scored=True), work, self._model.sizes, self._wire):
            yield self._sent(traffic)
        item, *others = tables
        yield self._compute("search", "bucketing, columns, windows", work.behaviors * costs.behavior)
        # On the shard each behaviour's row is read once, however many targets are scored with it.
        scan = work.behaviors * (costs.row + item.row_bytes / self._bandwidth) + self._scores(item.dim, costs.scan)
        yield self._compute("search", "scores of the behaviours here", scan)
        for table in others:
            what = "categories" if table.feature == "category" else table.feature
            yield self._compute("search", f"scores of {what}", self._category_scores(table))
        # What comes back from all shards is ranked once more on the sample's rank.
        merged = sum(
            work.targets * work.ranks * best_of_shard(sequence.pairs / work.targets, sequence.retrieved, work.ranks)
            for sequence in work.sequences
        )
        yield self._compute("search", "merging", merged * costs.pair)

    def _category_scores(self, table: PlannedTable) -> float:
        """Nanoseconds of another inherent feature's scores on a shard: a product of rows a pair, which caches hold."""
        work, costs = self._work, self._cluster.costs
        return work.pairs * (costs.cross + 2 * table.dim / self._rate)

    def _scores(self, dim: int, pair: float) -> float:
        """Nanoseconds of scoring all pairs."""
        crosses = len(self._model.tables.sides.cross_of(scored=True))
        products = self._model.search_products(dim)
        return self._work.pairs * (2 * products / self._rate + pair + crosses * self._cluster.costs.cross)

    def _selected(self, search: Search) -> Iterator[Cost]:
        """Rows of targets and of the selected behaviours, with gradient (`embeddings.tables.batch_rows`)."""
        roles, work = self._model.roles, self._work
        targets = {roles.target_attention, roles.target_representation}
        history = {roles.history_attention, roles.history_representation}
        # Each id is bucketed and gets its row back; only different ones travel.
        ids = work.behaviors if self._looks_up_all else work.kept
        different = work.behaviors if self._looks_up_all else work.selected
        for name in sorted(targets | history):
            # Pooled where the rows are: one vector a bag and shard comes back, not one a behaviour.
            if search == "shard" and self._model.could_pool_on_shards and name == roles.history_representation:
                bags = self._model.tables.sides.bags
                yield from self._pooling(
                    f"histories, {name}", [of for of in self._by_id[name] if of.feature not in bags]
                )
                # The means of bags are pooled on the sample's rank.
                here = [table for table in self._by_id[name] if table.feature in bags]
                if here:
                    yield from self._lookup(f"bags, {name}", here, ids + work.targets, different + work.targets, True)
                continue
            of_targets = work.targets * (name in targets)
            yield from self._lookup(
                f"selected, {name}",
                self._by_id[name],
                ids * (name in history) + of_targets,
                different * (name in history) + of_targets,
                gradient=True,
            )

    def _of_context(self) -> Iterator[Cost]:
        """Rows of users and impressions, with gradient."""
        if self._context:
            work, sizes = self._work, self._model.sizes
            for traffic in context_lookup(self._context, work, sizes):
                yield self._sent(traffic)
            # Of all ranks' ids those that are here.
            ids = [work.targets * (BAG_IDS if sizes.features[of.feature].kind == "ids" else 1) for of in self._context]
            ns = self._on_shard(self._context, ids, ids, gradient=True)
            yield self._compute("lookups", "context", ns + sum(ids) * self._cluster.costs.id)

    def _pooling(self, what: str, tables: Sequence[PlannedTable]) -> Iterator[Cost]:
        work, costs = self._work, self._cluster.costs
        ids = work.kept + work.targets
        for traffic in pooling_on_shard(what, tables, ids, work.parts, work.ranks, self._wire):
            yield self._sent(traffic)
        ns = self._on_shard(tables, [ids] * len(tables), [work.parts] * len(tables), gradient=True)
        passes = work.parts * TRAVEL_PASSES + work.targets * (1 + len(work.sequences)) * LOCAL_PASSES
        copied = passes * sum(table.dim for table in tables) * FLOAT * 2 / self._bandwidth
        yield self._compute("lookups", what, ns + copied + len(tables) * ids * costs.id)

    def _dense(self) -> Iterator[Cost]:
        """Attention, pooling, prediction, and the gradients of the dense parameters."""
        work, costs = self._work, self._cluster.costs
        kept = work.pairs if self._looks_up_all else work.kept
        crosses = sum(table.dim for table in self._cross)
        dim = sum(self._dim(name) for name in self._inherent) + crosses / max(1, len(work.sequences))
        attended = kept * dim * FLOAT * PASSES / self._bandwidth
        yield self._compute("dense", "attention and pooling", attended)
        # A product and a sum for each weight and target; the backward pass makes twice as many as the forward pass.
        products = 3 * 2 * self._dense_parameters * work.targets / self._rate
        inputs = self._inputs * work.targets * costs.input
        yield self._compute("dense", "prediction", products + inputs)
        for traffic in dense_gradients(self._dense_parameters, self._inputs, work.ranks):
            yield self._sent(traffic)

    def _lookup(
        self, what: str, tables: Sequence[PlannedTable], ids: float, different: float, gradient: bool
    ) -> Iterator[Cost]:
        """A lookup of rows by id.

        Args:
            what: what is looked up, for people.
            tables: row-wise.
            ids: of a rank.
            different: how many of them differ, as far as the workload says it.
            gradient: a backward pass follows.
        """
        asked = [ids_of(table.feature, different, self._model.sizes) for table in tables]
        for traffic in rows_lookup(what, tables, asked, self._work.ranks, gradient, self._wire):
            yield self._sent(traffic)
        # ``different`` is what the workload tells of equal ids; in a small table ids meet by chance besides.
        requested = [distinct(of_table, table.rows) for of_table, table in zip(asked, tables, strict=True)]
        ns = self._on_shard(tables, requested, requested, gradient)
        travelling = sum(count * table.dim for count, table in zip(requested, tables, strict=True))
        passes = ids * sum(table.dim for table in tables) * LOCAL_PASSES + travelling * TRAVEL_PASSES
        # The gradient takes the same way back.
        copied = passes * FLOAT * (1 + gradient) / self._bandwidth
        yield self._compute("lookups", what, ns + copied + len(tables) * ids * self._cluster.costs.id)

    def _on_shard(
        self, tables: Sequence[PlannedTable], ids: Sequence[float], bags: Sequence[float], gradient: bool
    ) -> float:
        """Nanoseconds of reading rows on a shard and writing them back."""
        costs, ns = self._cluster.costs, 0.0
        for table, of_ids in zip(tables, ids, strict=True):
            # Rows in the host's memory come over its link, which is slower than the device's memory.
            bandwidth = min(self._cluster.host_link, self._bandwidth) if table.on_host else self._bandwidth
            # A lookup has as many bags in each of its tables.
            output_ns = max(bags) * (costs.bag + 2 * table.dim * FLOAT / self._bandwidth)
            ns += of_ids * (costs.row + table.row_bytes / bandwidth) + output_ns
            if gradient:
                # The row is read and written, and the gradient of the output is read as the output was written.
                ns += of_ids * (costs.update + 2 * table.row_bytes / bandwidth) + output_ns
        return ns

    def _sent(self, traffic: Traffic) -> Cost:
        cluster = self._cluster
        # The same number of bytes goes to each peer; how many of them are on the same node decides over which link.
        intra_node_peers = min(cluster.devices_per_node, cluster.ranks) - 1
        inter_node_peers = cluster.ranks - 1 - intra_node_peers
        # Links are measured with an all-to-all; other collectives reach a share of its bandwidth.
        share = 1.0 if traffic.collective == "all_to_all" else getattr(cluster.collectives, traffic.collective)
        link = cluster.between_nodes if inter_node_peers else cluster.within_node
        us = traffic.collectives * link.latency
        # Both links are busy at the same time: the slower one decides.
        us += (
            traffic.to_each
            / share
            / 1e3
            * max(intra_node_peers / cluster.within_node.bandwidth, inter_node_peers / cluster.between_nodes.bandwidth)
        )
        alone = cluster.ranks == 1
        return Cost(
            traffic.phase,
            traffic.what,
            traffic.to_each * intra_node_peers,
            traffic.to_each * inter_node_peers,
            0.0 if alone else us / 1e3,
        )

    def _compute(self, phase: Phase, what: str, ns: float) -> Cost:
        return Cost(phase, what, 0, 0, ns / 1e6)

    def _dim(self, name: str, scored: bool = False) -> int:
        return sum(self._model.tables.inherent_dims(name, scored).values())

    @property
    def _bandwidth(self) -> float:
        """Bytes/ns."""
        return self._cluster.memory_bandwidth

    @property
    def _rate(self) -> float:
        """Floating-point operations a nanosecond."""
        return self._cluster.dense_rate * 1e3
