"""What ranks send each other in a step, collective by collective.

All is counted in bytes that one rank sends to each other rank; ids are taken to be even over the rows of a table, so
each rank sends the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from embeddings.search.messages import SearchMessages
from embeddings.sizes import DataSizes, figures
from embeddings.workload import Workload, distinct
from pipeline.planning.planned_tables import PlannedTable
from schemas.model import Feature

Phase = Literal["input dist", "search", "lookups", "output dist", "dense", "step"]
PHASES: tuple[Phase, ...] = ("input dist", "search", "lookups", "output dist", "dense", "step")

Collective = Literal["all_to_all", "reduce_scatter", "all_gather", "all_reduce"]

COUNT, LENGTH, FLOAT, WORD = 8, 4, 4, 4
"""Bytes of a count (int64), of a part's length (int32), of a float as it travels, and of a word of a record."""

BAG_IDS = 3
"""Values that a feature of several values is taken to have; a manifest does not say."""

SPAN = 2**31 - 1
"""Seconds that the behaviours of a batch are taken to lie apart at most: 68 years, one word."""


@dataclass(frozen=True)
class Traffic:
    """What a rank sends in one collective, or in several of a kind."""

    phase: Phase
    what: str
    """What is sent, for people."""
    collective: Collective
    to_each: float
    """Bytes that a rank sends to each other rank."""
    collectives: int = 1
    """How many collectives' latency it costs; 0: it travels with another one."""


def narrowest(largest: float) -> int:
    """Bytes of the narrowest integer type that holds 0 .. ``largest``."""
    return next((size for size, limit in ((1, 2**8), (2, 2**16), (4, 2**31)) if largest < limit), 8)


def rows_lookup(
    what: str, tables: Sequence[PlannedTable], ids: Sequence[float], ranks: int, gradient: bool, wire: int = FLOAT
) -> Iterator[Traffic]:
    """A lookup of rows by id (`embeddings.distributed.lookups`): of equal ids one travels.

    Args:
        what: what is looked up, for people.
        tables: of a collection, row-wise, one a feature.
        ids: that a rank looks up in each table.
        ranks: in all.
        gradient: a backward pass follows.
        wire: bytes of a float of a row on its way.
    """
    # Ids are even over the shards. Rows are counted within their shard, for which fewer bytes are enough.
    different = [(distinct(count, table.rows) / ranks, table) for count, table in zip(ids, tables, strict=True)]
    id_bytes = sum(count * narrowest(max(table.shard_rows) - 1) for count, table in different)
    row_bytes = sum(count * table.dim for count, table in different) * wire
    yield Traffic("input dist", f"counts of {what}", "all_to_all", len(tables) * COUNT)
    yield Traffic("input dist", f"ids of {what}", "all_to_all", id_bytes, len(tables))
    # A gradient takes the way of its row back, in as many bytes.
    for way in ("rows", "gradients")[: 1 + gradient]:
        yield Traffic("output dist", f"{way} of {what}", "all_to_all", row_bytes, len(tables))


def all_rows(what: str, tables: Sequence[PlannedTable]) -> Iterator[Traffic]:
    """All rows of tables, to all ranks (`embeddings.distributed.lookups`), and their gradients."""
    # Every shard sends as much as the largest: equal parts, of which the last one is filled up.
    held = sum(max(table.shard_rows) * table.dim for table in tables) * FLOAT
    yield Traffic("output dist", f"rows of {what}", "all_gather", held)
    yield Traffic("output dist", f"gradients of {what}", "reduce_scatter", held)


def search_on_shard(
    inherent: Sequence[PlannedTable],
    cross: Sequence[Feature],
    work: Workload,
    sizes: DataSizes,
    wire: int = FLOAT,
) -> Iterator[Traffic]:
    """Search where the rows live: behaviours go out once a user, at most K scores a target and shard come back.

    Args:
        inherent: the tables of the set's inherent features that behaviours are scored by, item first.
        cross: the cross features that they are scored by.
        work: of a rank.
        sizes: of the data, which decide how many words a record has.
        wire: bytes of a score on its way.
    """
    ranks, targets = work.ranks, work.targets
    item = next(table for table in inherent if table.feature == "item")
    messages = SearchMessages([table.feature for table in inherent], cross, max(item.shard_rows), sizes)
    # The figures by which every rank knows all sizes: of each pair of ranks, and of each rank.
    columns, of_rank = 1 + 2 * len(work.sequences), 3 + figures(sizes)
    yield Traffic("input dist", "counts of the search", "all_to_all", columns * COUNT)
    yield Traffic("input dist", "figures of the search", "all_gather", of_rank * COUNT)
    for name, sequence in zip(sizes.lengths, work.sequences, strict=True):
        behavior, target = messages.behavior_record(name, SPAN).words, messages.target_record(name, SPAN).words
        yield Traffic("input dist", "behaviours", "all_to_all", sequence.behaviors / ranks * behavior * WORD)
        yield Traffic("input dist", "targets and windows", "all_to_all", targets * target * WORD)
        answers = targets * best_of_shard(sequence.pairs / targets, sequence.retrieved, ranks)
        index = narrowest(sequence.length - 1)
        yield Traffic("output dist", "best of each shard", "all_to_all", answers * (wire + index), 2)
    for table in inherent:
        if not table.gathered:
            # A shard sends its part of all ranks' targets to each other.
            asked = ids_of(table.feature, targets, sizes)
            yield Traffic("input dist", f"targets' {table.feature} rows", "all_gather", asked * table.dim * FLOAT)
        if table.feature != "item" and not table.gathered:
            # A shard fetches each category that it has met once: the counts first, then the ids, then the rows back.
            met = distinct(ids_of(table.feature, work.behaviors, sizes), table.rows) / ranks
            what, row = f"rows of {table.feature}", narrowest(max(table.shard_rows) - 1)
            yield Traffic("input dist", f"counts of {what}", "all_to_all", COUNT)
            yield Traffic("input dist", f"ids of {what}", "all_to_all", met * row)
            yield Traffic("input dist", what, "all_to_all", met * table.dim * FLOAT)


def pooling_on_shard(
    what: str, tables: Sequence[PlannedTable], ids: float, parts: float, ranks: int, wire: int = FLOAT
) -> Iterator[Traffic]:
    """Weighted bags, pooled where the rows are (`embeddings.distributed.lookups`); the weights' gradients come back.

    Args:
        what: what is pooled, for people.
        tables: row-wise.
        ids: of a rank, in each feature.
        parts: of a rank's bags, on all shards together.
        ranks: in all.
        wire: bytes of a float of a sum on its way.
    """
    dim, features = sum(table.dim for table in tables), len(tables)
    wide = sum(narrowest(max(table.shard_rows) - 1) for table in tables)
    # Counts of ids and counts of parts; a part comes with the length of its bag.
    yield Traffic("input dist", f"counts of {what}", "all_to_all", 2 * features * COUNT)
    held = (ids * wide + features * parts * LENGTH) / ranks
    yield Traffic("input dist", f"ids of {what}", "all_to_all", held, 2 * features)
    # With gradients, which come back the same way.
    yield Traffic("input dist", f"weights of {what}", "all_to_all", features * ids / ranks * FLOAT, features)
    yield Traffic("output dist", f"rows of {what}", "all_to_all", parts / ranks * wire * dim, features)
    yield Traffic("output dist", f"gradients of {what}", "all_to_all", parts / ranks * wire * dim, features)
    yield Traffic(
        "output dist", f"weights' gradients of {what}", "all_to_all", features * ids / ranks * FLOAT, features
    )


def ids_of(feature: Feature, values: float, sizes: DataSizes) -> float:
    """How many ids are looked up for some values of a feature: as many, or those of the different bags that they are.

    Args:
        feature: of the data.
        values: of it, drawn evenly.
        sizes: of the data.
    """
    size = sizes.features.get(feature)
    return values if size is None or size.kind != "ids" else distinct(values, sizes.values(feature)) * BAG_IDS


def context_lookup(tables: Sequence[PlannedTable], work: Workload, sizes: DataSizes) -> Iterator[Traffic]:
    """A lookup of what belongs to users and impressions, by TorchRec's own lookup (`embeddings.tables.collections`).

    Args:
        tables: of the set ``context``, each sharded in its own way.
        work: of a rank.
        sizes: of the data.
    """
    ids, floats = 0.0, {"row_wise": 0.0, "table_wise": 0.0}
    for table in tables:
        # Each bag has a length, for every shard; all ids of a table that lies on one rank go there.
        spread = 1 if table.sharding_type == "row_wise" else 1 / work.ranks
        asked = work.targets * (BAG_IDS if sizes.features[table.feature].kind == "ids" else 1)
        ids += work.targets * LENGTH * spread + asked * COUNT / work.ranks
        # Every shard of a row-wise table answers for every bag of every rank.
        floats[table.sharding_type] += work.targets * table.dim * FLOAT * spread
    yield Traffic("input dist", "ids of context", "all_to_all", ids, 2)
    if floats["row_wise"]:
        yield Traffic("output dist", "rows of context", "reduce_scatter", floats["row_wise"])
        yield Traffic("output dist", "gradients of context", "all_gather", floats["row_wise"])
    if floats["table_wise"]:
        yield Traffic("output dist", "whole tables' rows of context", "all_to_all", floats["table_wise"], 2)
        yield Traffic("output dist", "whole tables' gradients of context", "all_to_all", floats["table_wise"])


def best_of_shard(behaviors: float, k: int, ranks: int) -> float:
    """How many of a target's behaviours a shard sends back: its part of them, but no more than K.

    Args:
        behaviors: of the target's history, on all shards.
        k: K.
        ranks: in all, a shard each.
    """
    return min(behaviors / ranks, k)


def dense_gradients(parameters: int, statistics: int, ranks: int) -> Iterator[Traffic]:
    """All-reduce of the dense gradients, and of batch normalisation's sums forwards and backwards.

    Args:
        parameters: dense ones.
        statistics: values of which batch normalisation sums the mean and the square.
        ranks: in all.
    """
    # An all-reduce is a reduce-scatter and an all-gather of equal parts.
    yield Traffic("dense", "dense gradients", "all_reduce", 2 * parameters * FLOAT / ranks)
    # Mean and square of each value, in float64, once forwards and once backwards.
    yield Traffic("dense", "batch statistics", "all_reduce", 2 * 2 * statistics * 8 / ranks, 2)
