"""Bytes of a step against a slow count, message by message, of a tiny case; times against a hand calculation."""

from collections import Counter

import pytest
import torch

from embeddings.models import build_model
from embeddings.plan.dry_run import dry_run
from embeddings.plan.step import StepModel
from embeddings.plan.tables import PlannedTable
from embeddings.plan.traffic import lookup, narrowest, pooling_on_shard, search_on_shard
from embeddings.plan.workload import Sequence, Workload
from embeddings.sizes import DataSizes
from schemas.plan import PlanSettings
from tests.plans import CLUSTER, plan_settings

RANKS = 3


def table(feature: str, rows: int, dim: int, sharding_type: str = "row_wise", owner: int = 0) -> PlannedTable:
    shards = RANKS if sharding_type == "row_wise" else 1
    return PlannedTable(
        name=f"{feature}_attention",
        set="attention",
        feature=feature,  # type: ignore[arg-type]
        rows=rows,
        dim=dim,
        value_bytes=4,
        state_bytes=0,
        sharding_type=sharding_type,
        compute_kernel="fused",
        ranks=tuple(range(RANKS)) if shards > 1 else (owner,),
        shard_rows=(rows // shards,) * shards,
    )


def sent(traffic: list, words: str) -> float:
    found = [part.to_each for part in traffic if words in part.what]
    assert found, words
    return sum(found)


def test_row_wise_lookup_sends_a_row_for_every_bag_to_every_rank() -> None:
    tables, bags = [table("item", 30, 8), table("category", 9, 4)], 11
    # Ids that are even over rows: rank r asks for each item in r's order, so a third goes to each rank.
    ids_of_rank = [[(rank + place) % 9 for place in range(9)] for rank in range(RANKS)]
    asked, answered = Counter(), Counter()
    for home in range(RANKS):
        for shard in range(RANKS):
            if shard == home:
                continue
            for of in tables:
                for _ in range(bags):
                    asked[home] += 4  # the length of a bag
                    answered[shard] += of.dim * 4  # its part of the sum, an empty bag's too
                for row in ids_of_rank[home]:
                    asked[home] += 4 * (row // 3 == shard)
    traffic = list(lookup("it", tables, bags, ids=9, ranks=RANKS, gradient=True))
    for rank in range(RANKS):
        assert sent(traffic, "ids of it") * (RANKS - 1) == asked[rank]
        assert sent(traffic, "rows of it") * (RANKS - 1) == answered[rank]
        assert sent(traffic, "gradients of it") * (RANKS - 1) == answered[rank]


def test_table_wise_lookup_is_the_owners_burden() -> None:
    tables = [table("item", 30, 8, "table_wise", 1), table("category", 9, 4, "table_wise", 1)]
    bags, ids = 11, 9
    by_rank = Counter()
    for home in range(RANKS):
        for of in tables:
            if home != of.ranks[0]:
                by_rank[of.ranks[0]] += bags * of.dim * 4
    (rows,) = [part for part in lookup("it", tables, bags, ids, RANKS, gradient=False) if "rows" in part.what]
    assert rows.busiest * (RANKS - 1) == by_rank[1]
    assert rows.to_each * (RANKS - 1) * RANKS == by_rank.total()


def test_search_on_shard_against_messages() -> None:
    """Each rank: 2 users with 3 targets each; a user's 12 behaviours are even over the shards."""
    users, per_user, length, k = 2, 3, 12, 5
    item, category = table("item", 30, 8), table("category", 9, 4)
    behaviors, answers, targets = Counter(), Counter(), Counter()
    for home in range(RANKS):
        for shard in range(RANKS):
            if shard == home:
                continue
            for _user in range(users):
                for place in range(length):
                    if place % RANKS == shard:
                        behaviors[home] += 4 + 1 + 1  # row, category, position
                for _target in range(per_user):
                    targets[home] += 4 + 1 + 4  # item, category, position
                    targets[home] += 4 + 1  # window: start, length
                    there = sum(place % RANKS == shard for place in range(length))
                    answers[shard] += min(there, k) * (4 + 1)  # score, place
    work = Workload(RANKS, users * per_user, (Sequence(length, users * length, users * per_user * length, k),))
    traffic = list(search_on_shard([item, category], ("item", "category", "position"), work, categories=9))
    for rank in range(RANKS):
        assert sent(traffic, "behaviours") * (RANKS - 1) == behaviors[rank]
        assert (
            sum(part.to_each for part in traffic if part.what in ("targets", "windows")) * (RANKS - 1) == targets[rank]
        )
        assert sent(traffic, "best of each shard") * (RANKS - 1) == answers[rank]
    assert sent(traffic, "targets' item rows") == users * per_user * 8 * 4
    # 24 behaviours of 9 categories: nearly all are met, none twice.
    met = sent(traffic, "category rows") / (4 * 4) * RANKS
    assert 9 * 0.9 < met < 9


def test_pooling_answers_once_a_bag() -> None:
    tables, bags, ids = [table("item", 30, 8), table("category", 9, 4)], 6, 9
    traffic = list(pooling_on_shard("it", tables, bags, ids, RANKS))
    assert sent(traffic, "rows of it") == bags * (8 + 4) * 4
    assert sent(traffic, "weights of it") == 2 * 3 * 4
    assert sent(traffic, "weights' gradients") == 2 * 3 * 4


def test_narrowest() -> None:
    assert [narrowest(largest) for largest in (255, 256, 65_535, 65_536, 2**31)] == [1, 2, 2, 4, 8]


def test_a_step_is_the_sum_of_its_parts_and_links_are_counted_apart() -> None:
    settings = plan_settings("cluster.nodes=2", "cluster.devices_per_node=4")
    run = dry_run(settings, DataSizes(items=1000, categories=50, lengths={"history": 100}))
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
        DataSizes(items=1000, categories=50, lengths={"history": 100}),
    )
    assert all(step.sent == 0 for step in run.steps.values())
    assert all(cost.ms == 0 for step in run.steps.values() for cost in step.costs if "dist" in cost.phase)


def test_time_of_a_collective_by_hand() -> None:
    settings = plan_settings("cluster.nodes=2", "cluster.devices_per_node=2")
    sizes = DataSizes(items=1000, categories=50, lengths={"history": 100})
    run = dry_run(settings, sizes)
    (gathered,) = [cost for cost in run.steps["shard"].costs if cost.what == "targets' item rows"]
    size = settings.stream.batch_size * settings.model.attention.dim * 4
    cluster = settings.cluster
    slower = max(1 / cluster.within_node.bandwidth, 2 / cluster.between_nodes.bandwidth)
    expected_us = cluster.between_nodes.latency + size / 1e3 * slower / cluster.collectives.all_gather
    assert gathered.ms == pytest.approx(expected_us / 1e3)
    assert (gathered.within_node, gathered.between_nodes) == (size, 2 * size)


def longer(settings: PlanSettings, search: str, **sizes: int) -> float:
    where = {"items": 1000, "categories": 50, "lengths": {"history": settings.stream.history_length}} | sizes
    return dry_run(settings, DataSizes(**where)).steps[search].bytes_per_sample  # type: ignore[arg-type, index]


def test_halving_the_attention_dim_halves_what_search_at_home_moves() -> None:
    wide, narrow = (
        sum(
            cost.within_node
            for cost in dry_run(
                plan_settings(f"model.attention.dim={dim}"),
                DataSizes(items=1000, categories=50, lengths={"history": 100}),
            )
            .steps["home"]
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
    settings = plan_settings()
    sizes = DataSizes(items=1000, categories=50, lengths={"history": 100})
    model = build_model(settings.model, sizes, torch.device("meta"))
    step = StepModel(model, (), Workload.of(settings, sizes), CLUSTER)
    assert step.dense_parameters == sum(weight.numel() for weight in model.prediction.parameters())
