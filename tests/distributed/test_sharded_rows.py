"""Rows from the shards against one process: values, gradients, traffic; whole small tables; plans of other kinds."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import embedding

from embeddings.distributed.collectives import sum_over_ranks
from embeddings.models import build_model
from embeddings.sharding import make_plan, shard
from embeddings.sizes import DataSizes
from embeddings.tables import specs
from pipeline.planning.measuring import TrafficCounter
from pipeline.planning.planned_tables import planned_tables
from pipeline.planning.traffic import all_rows, rows_lookup
from schemas.model import ModelSettings, TableChange, TableSet
from tests.launcher import run_ranks
from tests.tolerance import largest, rounding
from tests.toy_model import fill

CPU = torch.device("cpu")
META = torch.device("meta")
DIMS = {"item": 8, "category": 12}
ROWS = {"item": 51, "category": 7}
SIZES = DataSizes.counted(items=50, categories=6, lengths={"history": 12}, behaviors=5)


def settings_of(**rates: float) -> ModelSettings:
    changes = {name: TableChange(dim=DIMS[name], learning_rate=rate) for name, rate in rates.items()}
    tables = TableSet(optimizer="sgd", learning_rate=1.0, features=changes)
    return ModelSettings(
        features=("item", "category", "position", "behavior"), attention=tables, representation=tables, search="local"
    )


def sharded_tables(settings: ModelSettings, change: Callable[[dict], None] = lambda plan: None) -> torch.nn.Module:
    model = build_model(settings, SIZES, META)
    plan = make_plan(model, CPU, batch_size=64)
    change(plan.plan)
    sharded = shard(model, CPU, plan)
    model.state = {key.split(".")[-2]: value for key, value in sharded.state_dict().items() if "embedding_bags" in key}
    return model


def assert_holds(sharded: Any, rows: torch.Tensor, summands: int, gradient: float) -> None:
    """Its shards hold these rows, from which gradients were subtracted that are sums of ``summands`` terms."""
    atol = rounding(summands, gradient) + rounding(1, largest(rows))
    for piece in sharded.local_shards():
        first, size = piece.metadata.shard_offsets[0], piece.metadata.shard_sizes[0]
        torch.testing.assert_close(piece.tensor, rows[first : first + size], atol=atol, rtol=0)


def asked_of(rank: int, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Ids of a rank, which are valid, and what their rows are multiplied by; the last rank has none at times."""
    draw = torch.Generator().manual_seed(100 * seed + rank)
    nothing = seed % 2 and rank == dist.get_world_size() - 1
    count = 0 if nothing else int(torch.randint(1, 40, (1,), generator=draw))
    ids = {name: torch.randint(0, rows, (count,), generator=draw, dtype=torch.int32) for name, rows in ROWS.items()}
    factor = torch.randn(count, sum(DIMS.values()), generator=draw)
    return ids, torch.rand(count, generator=draw) < (0.0 if seed == 4 else 0.8), factor


def looked_up(model: torch.nn.Module, ids: dict[str, torch.Tensor], valid: torch.Tensor) -> torch.Tensor:
    """Rows of the attention tables, side by side, with zeros for those that are not valid."""
    rows = model.tables.inherent_rows("attention", ids, valid, model.tables.small_rows(CPU))
    return torch.cat([of.rows_Ld[of.index_B] for of in rows.values()], dim=1) * valid[:, None]


def loss_alone(tables: dict[str, torch.Tensor], rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, valid, factor = asked_of(rank, seed)
    rows = torch.cat([embedding(ids[name], table) for name, table in tables.items()], dim=1) * valid[:, None]
    return (rows * factor).square().sum(), rows


def rows_as_alone(rates: dict[str, float], change: Callable[[dict], None] = lambda plan: None) -> None:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    model = sharded_tables(settings_of(**rates), change)
    for seed in range(6):
        draw = torch.Generator().manual_seed(seed)
        tables = {name: torch.randn(ROWS[name], dim, generator=draw) for name, dim in DIMS.items()}
        for name, rows in tables.items():
            fill(model.state[f"{name}_attention"], rows)
        ids, valid, factor = asked_of(rank, seed)
        found = looked_up(model, ids, valid)
        (found * factor).square().sum().backward()

        grown = {name: rows.clone().requires_grad_() for name, rows in tables.items()}
        alone = [loss_alone(grown, other, seed) for other in range(ranks)]
        assert torch.equal(found, alone[rank][1])  # rows are copied, as they are
        (sum(loss for loss, _ in alone) / ranks).backward()
        for name, rows in grown.items():
            # No row is looked up more than 40 times by a rank.
            step = rates[name] * rows.grad
            assert_holds(model.state[f"{name}_attention"], rows.detach() - step, 40 * ranks, largest(step))


def rows_with_one_optimizer_and_with_two() -> None:
    rows_as_alone({"item": 1.0, "category": 1.0})
    specs.GATHERED_BYTES = 0  # now categories are looked up by id, as items are
    rows_as_alone({"item": 1.0, "category": 1.0})
    rows_as_alone({"category": 0.5, "item": 1.0})


@pytest.mark.parametrize("ranks", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_values_and_gradients_are_those_of_one_process(ranks: int) -> None:
    run_ranks(ranks, rows_with_one_optimizer_and_with_two)


def table_wise(plan: dict) -> None:
    """A plan of the older kind, which left categories and cross tables to the planner."""
    for tables in plan.values():
        for name, sharding in tables.items():
            if not name.startswith("item_"):
                of_all = sharding.sharding_spec.shards
                of_all[0].shard_sizes[0] = sum(part.shard_sizes[0] for part in of_all)
                del of_all[1:]
                sharding.sharding_type, sharding.ranks = "table_wise", [0]


def rows_of_a_plan_that_is_not_row_wise() -> None:
    rows_as_alone({"item": 1.0, "category": 1.0}, table_wise)
    whole_as_alone(table_wise)


def whole_as_alone(change: Callable[[dict], None] = lambda plan: None) -> None:
    """Tables of 13 and 6 rows; with four ranks the latter are not row-wise."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    model = sharded_tables(settings_of(item=1.0, category=1.0), change)
    draw = torch.Generator().manual_seed(3)
    tables = {
        f"history_{feature}_{of}": torch.randn(rows, 16, generator=draw)
        for feature, rows in (("position", 13), ("behavior", 6))
        for of in ("attention", "representation")
    }
    for name, rows in tables.items():
        fill(model.state[name], rows)
    for _ in range(2):
        found = model.tables.small_rows(CPU).cross
        loss = torch.zeros(())
        for name, rows in tables.items():
            _, feature, of = name.split("_")
            torch.testing.assert_close(found[of]["history"][feature], rows, atol=rounding(ranks, largest(rows)), rtol=0)
            loss = loss + (found[of]["history"][feature] * (rank + 1)).square().sum()
        loss.backward()
        factor = 2 * sum((other + 1) ** 2 for other in range(ranks)) / ranks
        tables = {name: rows - factor * rows for name, rows in tables.items()}
        for name, rows in tables.items():
            assert_holds(model.state[name], rows, 2 * ranks, largest(rows))


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_whole_tables_are_those_of_one_process(ranks: int) -> None:
    run_ranks(ranks, whole_as_alone)


def test_plans_that_are_not_row_wise_work_at_home() -> None:
    run_ranks(2, rows_of_a_plan_that_is_not_row_wise)


def bytes_of_lookups() -> None:
    """Each rank asks for every item many times, so for each shard's rows once."""
    ranks = dist.get_world_size()
    model = build_model(settings_of(item=1.0, category=1.0), SIZES, META)
    plan = make_plan(model, CPU, batch_size=64)
    tables = planned_tables(build_model(settings_of(item=1.0, category=1.0), SIZES, META), plan)
    shard(model, CPU, plan)
    ids = {name: torch.arange(1000, dtype=torch.int32) % rows for name, rows in ROWS.items()}
    specs.GATHERED_BYTES = 0
    small = model.tables.small_rows(CPU)
    with TrafficCounter() as counted:
        rows = model.tables.inherent_rows("attention", ids, None, small)
        sum(of.rows_Ld.sum() for of in rows.values()).backward()
    asked = [table for table in tables if table.set == "attention" and table.inherent]
    planned = sum(part.to_each for part in rows_lookup("it", asked, [1000] * len(asked), ranks, gradient=True)) * (
        ranks - 1
    )
    # The last shards have fewer rows to send.
    assert sum_over_ranks(torch.tensor(counted.bytes)).item() / ranks == pytest.approx(planned, rel=0.02)

    with TrafficCounter() as counted:
        rows = model.tables.small_rows(CPU)
        sum(part.sum() for of in rows.cross.values() for part in of["history"].values()).backward()
    small = [table for table in tables if not table.inherent]
    assert counted.bytes == sum(part.to_each for part in all_rows("it", small)) * (ranks - 1)


def test_the_plan_knows_what_lookups_send() -> None:
    run_ranks(3, bytes_of_lookups)


def refused(categories: int) -> None:
    model = build_model(ModelSettings(), DataSizes.counted(50, categories, {"history": 12}), META)
    with pytest.raises(ValueError, match=r"table category_attention: 4 rows are too few .* on 3 ranks of a CPU"):
        shard(model, CPU, make_plan(model, CPU, batch_size=64))


def test_a_rank_without_rows_is_refused_on_a_cpu() -> None:
    run_ranks(3, refused, 3)
