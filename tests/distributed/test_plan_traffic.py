"""Bytes of a step against a slow count, message by message, of a tiny case; times against a hand calculation."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from embeddings.models import build_model
from embeddings.planning import dense_parameters
from embeddings.sizes import DataSizes
from embeddings.workload import SequenceWorkload, Workload
from pipeline.planning.dry_run import dry_run
from pipeline.planning.planned_tables import PlannedTable
from pipeline.planning.traffic import all_rows, narrowest, pooling_on_shard, rows_lookup, search_on_shard
from schemas.plan import PlanSettings
from tests.plans import plan_settings

RANKS = 3


def table(feature: str, rows: int, dim: int) -> PlannedTable:
    return PlannedTable(
        name=f"{feature}_attention",
        kind="inherent",
        set="attention",
        feature=feature,  # type: ignore[arg-type]
        rows=rows,
        dim=dim,
        value_bytes=4,
        state_bytes=0,
        sharding_type="row_wise",
        compute_kernel="fused",
        ranks=tuple(range(RANKS)),
        shard_rows=(rows // RANKS,) * RANKS,
        gathered=False,
    )


def sent(traffic: list, words: str) -> float:
    parts = [part.to_each for part in traffic if words in part.what]
    assert parts, words
    return sum(parts)


def test_a_row_travels_once_to_each_rank_that_asks_for_it() -> None:
    tables = [table("item", 30, 8), table("category", 9, 4)]
    # Each rank asks for all rows, many times.
    asked, answered = Counter(), Counter()
    for rank in range(RANKS):
        for of in tables:
            for row in range(of.rows):
                shard = row // (of.rows // RANKS)
                asked[rank] += (shard != rank) * 1  # a shard has less than 256 rows
                answered[shard] += (shard != rank) * of.dim * 4
            asked[rank] += 8 * (RANKS - 1)  # how many
    traffic = list(rows_lookup("it", tables, ids=[1000, 1000], ranks=RANKS, gradient=True))
    for rank in range(RANKS):
        assert (sent(traffic, "ids of it") + sent(traffic, "counts of it")) * (RANKS - 1) == pytest.approx(asked[rank])
        assert sent(traffic, "rows of it") * (RANKS - 1) == pytest.approx(answered[rank])
        assert sent(traffic, "gradients of it") * (RANKS - 1) == pytest.approx(answered[rank])


def test_of_few_ids_in_a_large_table_all_are_different() -> None:
    (rows,) = [
        part for part in rows_lookup("it", [table("item", 3_000_000, 8)], [90], RANKS, False) if "rows" in part.what
    ]
    assert rows.to_each == pytest.approx(90 / RANKS * 8 * 4, rel=1e-4)


def test_cross_tables_go_from_each_shard_to_all_and_back() -> None:
    traffic = list(all_rows("it", [table("position", 30, 8), table("scene", 9, 4)]))
    assert sent(traffic, "rows of it") == sent(traffic, "gradients of it") == (10 * 8 + 3 * 4) * 4


def test_search_on_shard_against_messages() -> None:
    """Each rank: 2 users with 3 targets each; a user's 12 behaviours are even over the shards."""
    users, per_user, length, k = 2, 3, 12, 5
    item, category = table("item", 30, 8), table("category", 9, 4)
    behaviors, answers, targets = Counter(), Counter(), Counter()
    for rank in range(RANKS):
        for shard in range(RANKS):
            if shard == rank:
                continue
            for _user in range(users):
                for position in range(length):
                    # Row, category and position together have no more than 32 bits: 4 + 4 + 4.
                    behaviors[rank] += 4 * (position % RANKS == shard)
                for _target in range(per_user):
                    # A window's start has 31 bits; its length, the position of its end, item and category are a word.
                    targets[rank] += 2 * 4
                    there = sum(position % RANKS == shard for position in range(length))
                    answers[shard] += min(there, k) * (4 + 1)  # score, index
    work = Workload(RANKS, users * per_user, (SequenceWorkload(length, users * length, users * per_user * length, k),))
    sizes = DataSizes.counted(items=29, categories=8, lengths={"history": length})
    traffic = list(search_on_shard([item, category], ("position",), work, sizes))
    for rank in range(RANKS):
        assert sent(traffic, "behaviours") * (RANKS - 1) == behaviors[rank]
        assert sent(traffic, "targets and windows") * (RANKS - 1) == targets[rank]
        assert sent(traffic, "best of each shard") * (RANKS - 1) == answers[rank]
    # The rows of 18 targets of all ranks; a shard has a third of them.
    for of in (item, category):
        assert sent(traffic, f"targets' {of.feature} rows") == users * per_user * of.dim * 4
    # 24 behaviours of 9 categories: nearly all are met, none twice.
    (fetched,) = [part for part in traffic if part.what == "rows of category"]
    met = fetched.to_each / (4 * 4) * RANKS
    assert 9 * 0.9 < met < 9


def test_a_gathered_table_adds_nothing_to_a_search() -> None:
    work = Workload(RANKS, 6, (SequenceWorkload(12, 24, 72, 5),))
    sizes = DataSizes.counted(items=29, categories=8, lengths={"history": 12})
    tables = [table("item", 30, 8), replace(table("category", 9, 4), gathered=True)]
    traffic = search_on_shard(tables, ("position",), work, sizes)
    assert not [part.what for part in traffic if "category" in part.what]


def test_pooling_answers_once_a_part() -> None:
    tables, ids, parts = [table("item", 30, 8), table("category", 9, 4)], 9, 6
    traffic = list(pooling_on_shard("it", tables, ids, parts, RANKS))
    assert sent(traffic, "rows of it") == parts / RANKS * (8 + 4) * 4
    assert sent(traffic, "ids of it") == 2 * (ids / RANKS * 1 + parts / RANKS * 4)
    assert sent(traffic, "weights of it") == 2 * 3 * 4
    assert sent(traffic, "weights' gradients") == 2 * 3 * 4


def test_parts_of_bags_are_counted_by_the_shards_that_have_an_id_of_them() -> None:
    work = Workload(RANKS, 10_000, (SequenceWorkload(12, 120_000, 120_000, 2),))
    draw = torch.randint(0, RANKS, (10_000, 2), generator=torch.Generator().manual_seed(1))
    touched = sum(len(set(bag)) for bag in draw.tolist())
    assert work.parts == pytest.approx(10_000 + touched, rel=0.01)


def test_narrowest() -> None:
    assert [narrowest(largest) for largest in (255, 256, 65_535, 65_536, 2**31)] == [1, 2, 2, 4, 8]


def test_a_step_is_the_sum_of_its_parts_and_links_are_counted_apart() -> None:
    settings = plan_settings("cluster.nodes=2", "cluster.devices_per_node=4")
    run = dry_run(settings, DataSizes.counted(items=1000, categories=50, lengths={"history": 100}))
    for step in run.steps.values():
        assert sum(cost.ms for cost in step.phases().values()) == pytest.approx(step.ms)
        within = sum(cost.within_node for cost in step.costs)
        between = sum(cost.between_nodes for cost in step.costs)
        assert within > 0
        assert between == pytest.approx(within * 4 / 3)  # 4 ranks elsewhere, 3 on this node
        assert step.bytes_per_sample == pytest.approx((within + between) / settings.stream.batch_size)


def test_one_rank_sends_nothing() -> None:
    run = dry_run(
        plan_settings("cluster.nodes=1", "cluster.devices_per_node=1"),
        DataSizes.counted(items=1000, categories=50, lengths={"history": 100}),
    )
    assert all(step.sent == 0 for step in run.steps.values())
    assert all(cost.ms == 0 for step in run.steps.values() for cost in step.costs if "dist" in cost.phase)


def test_time_of_a_collective_by_hand() -> None:
    settings = plan_settings("cluster.nodes=2", "cluster.devices_per_node=2")
    sizes = DataSizes.counted(items=1000, categories=50, lengths={"history": 100})
    run = dry_run(settings, sizes)
    (gathered,) = [cost for cost in run.steps["shard"].costs if cost.what == "targets' item rows"]
    size = settings.stream.batch_size * settings.model.attention.dim * 4
    cluster = settings.cluster
    slower = max(1 / cluster.within_node.bandwidth, 2 / cluster.between_nodes.bandwidth)
    expected_us = cluster.between_nodes.latency + size / 1e3 * slower / cluster.collectives.all_gather
    assert gathered.ms == pytest.approx(expected_us / 1e3)
    assert (gathered.within_node, gathered.between_nodes) == pytest.approx((size, 2 * size))


def longer(settings: PlanSettings, search: str, **sizes: int) -> float:
    where = {"items": 1000, "categories": 50, "lengths": {"history": settings.stream.history_length}} | sizes
    return dry_run(settings, DataSizes.counted(**where)).steps[search].bytes_per_sample  # type: ignore[arg-type, index]


def test_halving_the_attention_dim_halves_what_local_search_moves() -> None:
    wide, narrow = (
        sum(
            cost.within_node
            for cost in dry_run(
                plan_settings(f"model.attention.dim={dim}"),
                DataSizes.counted(items=1000, categories=50, lengths={"history": 100}),
            )
            .steps["local"]
            .costs
            if cost.what == "rows of behaviours"
        )
        for dim in (32, 16)
    )
    assert wide == 2 * narrow > 0


def test_users_who_share_a_history_send_it_once() -> None:
    alone, shared = (
        longer(plan_settings("stream.history_length=2000", f"workload.targets_per_user={many}"), "shard")
        for many in (1, 8)
    )
    assert shared < alone


def test_dense_parameters_are_the_models() -> None:
    sizes = DataSizes.counted(items=1000, categories=50, lengths={"history": 100})
    model = build_model(plan_settings().model, sizes, torch.device("meta"))
    assert dense_parameters(model) == sum(weight.numel() for weight in model.prediction.parameters())
