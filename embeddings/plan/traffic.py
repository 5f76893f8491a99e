"""What ranks send each other in a step, collective by collective.

All is counted in bytes that one rank sends to each other rank. A row-wise lookup of bags is a reduce-scatter: each
shard answers for every bag of every rank, most of them empty, so what a rank sends grows with the number of ranks.
That is what `EmbeddingBagCollection` does, whose every bag here holds one id.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import exp
from typing import Literal

from embeddings.plan.tables import PlannedTable
from embeddings.plan.workload import Workload
from schemas.model import Feature

Phase = Literal["input dist", "search", "lookups", "output dist", "dense", "step"]
PHASES: tuple[Phase, ...] = ("input dist", "search", "lookups", "output dist", "dense", "step")

Collective = Literal["all_to_all", "reduce_scatter", "all_gather", "all_reduce"]

ID, LENGTH, FLOAT = 4, 4, 4
"""Bytes of an id (int32), of a bag's length, and of a float as it travels."""


@dataclass(frozen=True)
class Traffic:
    """One collective, or several alike."""

    phase: Phase
    what: str
    collective: Collective
    to_each: float
    """Bytes that a rank sends to each other rank, on the mean over ranks."""
    busiest: float
    """The same of the rank that sends or receives most: table-wise tables have one owner."""
    collectives: int = 1
    """Whose latency it costs."""


def even(phase: Phase, what: str, collective: Collective, to_each: float, collectives: int = 1) -> Traffic:
    """Traffic that is the same on all ranks."""
    return Traffic(phase, what, collective, to_each, to_each, collectives)


def narrowest(largest: float) -> int:
    """Bytes of the narrowest integer type that holds 0 .. ``largest``."""
    return next((size for size, limit in ((1, 2**8), (2, 2**16), (4, 2**31)) if largest < limit), 8)


def lookup(
    what: str, tables: Sequence[PlannedTable], bags: float, ids: float, ranks: int, gradient: bool
) -> Iterator[Traffic]:
    """A lookup of bags of one in a sharded `EmbeddingBagCollection`.

    Args:
        what: is looked up.
        tables: of the collection, one a feature.
        bags: of a rank, empty ones too; the same on all ranks.
        ids: of a rank; evenly over the rows.
        ranks: in all.
        gradient: a backward pass follows.
    """
    by_type = sorted(tables, key=lambda table: table.sharding_type)
    for sharding_type, members in groupby(by_type, key=lambda table: table.sharding_type):
        group = list(members)
        answer = bags * FLOAT
        if sharding_type == "row_wise":
            dim = sum(table.dim for table in group)
            asked = len(group) * (bags * LENGTH + ids / ranks * ID)
            yield even("input dist", f"ids of {what}", "all_to_all", asked, collectives=3)
            yield even("output dist", f"rows of {what}", "reduce_scatter", answer * dim)
            if gradient:
                yield even("output dist", f"gradients of {what}", "all_gather", answer * dim)
        else:
            # Each owner is asked for all bags of its tables, and answers with their rows.
            owned: dict[int, list[PlannedTable]] = {}
            for table in group:
                owned.setdefault(table.ranks[0], []).append(table)
            asked = bags * LENGTH + ids * ID
            busiest_asked = max(len(mine) for mine in owned.values()) * asked
            busiest_dim = max(sum(table.dim for table in mine) for mine in owned.values())
            mean_dim = sum(table.dim for table in group) / ranks
            mean_asked = len(group) / ranks * asked
            yield Traffic("input dist", f"ids of {what}", "all_to_all", mean_asked, busiest_asked, 3)
            for way in ("rows", "gradients")[: 1 + gradient]:
                name = f"{way} of {what}"
                yield Traffic("output dist", name, "all_to_all", answer * mean_dim, answer * busiest_dim)


def search_on_shard(
    inherent: Sequence[PlannedTable], features: Sequence[Feature], work: Workload, categories: int
) -> Iterator[Traffic]:
    """Search where the rows live: behaviours go out once a user, at most K scores a target and shard come back.

    Args:
        inherent: the set's item and category tables.
        features: of a behaviour.
        work: of a rank.
        categories: rows of the category table.
    """
    ranks, targets = work.ranks, work.targets
    dims = {table.feature: table.dim for table in inherent}
    known = narrowest(categories) if "category" in features else 0
    for sequence in work.sequences:
        wide = narrowest(sequence.length)
        widths = {"item": ID, "category": known, "position": wide, "interval": 4, "behavior": 1, "scene": 1}
        behavior = sum(widths[feature] for feature in features)
        yield even("input dist", "behaviours", "all_to_all", sequence.behaviors / ranks * behavior, 0)
        yield even("input dist", "windows", "all_to_all", targets * (ID + wide), 0)
        found = found_on_shard(sequence.pairs / targets, sequence.retrieved, ranks)
        yield even("output dist", "best of each shard", "all_to_all", targets * found * (FLOAT + wide), 1)
    target = ID + known + sum({"position": 4, "interval": 4, "scene": 1}.get(feature, 0) for feature in features)
    yield even("input dist", "targets", "all_to_all", targets * target, 2)
    yield even("input dist", "targets' item rows", "all_gather", targets * dims["item"] * FLOAT)
    if "category" in dims:
        # A shard fetches each category that it has met once.
        met = categories * (1 - exp(-work.behaviors / categories))
        yield even("input dist", "ids of categories", "all_to_all", met / ranks * ID, 2)
        yield even("input dist", "category rows", "all_to_all", met / ranks * dims["category"] * FLOAT)


def pooling_on_shard(
    what: str, tables: Sequence[PlannedTable], bags: float, ids: float, ranks: int
) -> Iterator[Traffic]:
    """Weighted bags, pooled where the rows are; the weights' gradients come back.

    Args:
        what: is pooled.
        tables: row-wise.
        bags: of a rank, in each feature.
        ids: of a rank, in each feature.
        ranks: in all.
    """
    dim, features = sum(table.dim for table in tables), len(tables)
    yield even("input dist", f"lengths of {what}", "all_to_all", features * bags * LENGTH)
    yield even("input dist", f"ids of {what}", "all_to_all", features * ids / ranks * ID)
    yield even("input dist", f"weights of {what}", "all_to_all", features * ids / ranks * FLOAT)
    yield even("output dist", f"rows of {what}", "reduce_scatter", bags * FLOAT * dim)
    yield even("output dist", f"gradients of {what}", "all_gather", bags * FLOAT * dim)
    yield even("output dist", f"weights' gradients of {what}", "all_to_all", features * ids / ranks * FLOAT)


def found_on_shard(behaviors: float, k: int, ranks: int) -> float:
    """How many of a target's behaviours a shard sends home: its part of them, but no more than K."""
    return min(behaviors / ranks, k)


def dense_gradients(parameters: int, statistics: int, ranks: int) -> Iterator[Traffic]:
    """All-reduce of the dense gradients, and of batch normalisation's sums forwards and backwards."""
    # An all-reduce is a reduce-scatter and an all-gather of equal parts.
    yield even("dense", "dense gradients", "all_reduce", 2 * parameters * FLOAT / ranks)
    yield even("dense", "batch statistics", "all_reduce", 2 * 2 * statistics * 8 / ranks, 2)
