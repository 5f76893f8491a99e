"""Pooling on the shards against gathering and pooling in one process: values, and gradients of rows and of weights."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import embedding_bag

from embeddings.distributed.lookups import WeightedBags
from embeddings.models import build_model
from embeddings.sharding import make_plan, shard
from embeddings.sizes import DataSizes
from schemas.model import ModelSettings, TableChange, TableSet
from tests.launcher import run_ranks
from tests.tolerance import largest, rounding
from tests.toy_model import fill

CPU = torch.device("cpu")
DIMS = {"item": 8, "category": 12}
ROWS = {"item": 51, "category": 8}


def bags_of(rank: int, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, weights and lengths of a rank's bags, and what their sums are multiplied by; the last rank has none."""
    draw = torch.Generator().manual_seed(100 * seed + rank)
    count = 0 if seed and rank == dist.get_world_size() - 1 else int(torch.randint(1, 9, (1,), generator=draw))
    length = torch.randint(0, 6, (count,), generator=draw)
    total = int(length.sum())
    ids = {name: torch.randint(0, rows, (total,), generator=draw, dtype=torch.int32) for name, rows in ROWS.items()}
    weight = torch.rand(total, generator=draw, requires_grad=True)
    return ids, weight, length, torch.randn(count, sum(DIMS.values()), generator=draw)


def loss_alone(tables: dict[str, torch.Tensor], rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, weight, length, factor = bags_of(rank, seed)
    first = (length.cumsum(0) - length).long()
    parts = [
        embedding_bag(ids[name].long(), rows, first, mode="sum", per_sample_weights=weight)
        for name, rows in tables.items()
    ]
    return (torch.cat(parts, dim=1) * factor).square().sum(), weight


def pooled_as_alone(learning_rates: tuple[float, float]) -> None:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    settings = ModelSettings(
        features=("item", "category"),
        representation=TableSet(
            optimizer="sgd",
            features={
                name: TableChange(dim=DIMS[name], learning_rate=rate)
                for name, rate in zip(DIMS, learning_rates, strict=True)
            },
        ),
    )
    model = build_model(settings, DataSizes.counted(50, 7, {"history": 12}), torch.device("meta"))
    sharded = shard(model, CPU, make_plan(model, CPU, batch_size=64))
    state = {key.split(".")[-2]: value for key, value in sharded.state_dict().items() if "embedding_bags" in key}
    for seed in range(6):
        draw = torch.Generator().manual_seed(seed)
        tables = {name: torch.randn(ROWS[name], dim, generator=draw) for name, dim in DIMS.items()}
        for name, rows in tables.items():
            fill(state[f"{name}_representation"], rows)

        ids, weight, length, factor = bags_of(rank, seed)
        bag = torch.arange(len(length)).repeat_interleave(length)
        # Entries that are not valid are between those that are; their weights and ids are of no meaning.
        valid = torch.rand(2 * len(bag), generator=draw).argsort() < len(bag)
        place = valid.nonzero().flatten()
        padded_bag = bag[(valid.cumsum(0) - 1).clamp(min=0)] if len(bag) else bag
        padded = {name: torch.zeros(len(valid), dtype=torch.int32).index_copy(0, place, of) for name, of in ids.items()}
        padded_weight = torch.full((len(valid),), torch.nan).index_copy(0, place, weight)
        bags = WeightedBags(padded, padded_weight, valid, padded_bag, len(length))
        sums = model.tables.pooled_rows("representation", bags)
        loss = (torch.cat([sums[name] for name in DIMS], dim=1) * factor).square().sum()
        loss.backward()

        grown = {name: rows.clone().requires_grad_() for name, rows in tables.items()}
        losses = [loss_alone(grown, other, seed) for other in range(ranks)]
        # A bag has up to 5 rows, a rank up to 8 bags, and the loss adds up 20 floats of each.
        products = 5 * 8 * sum(DIMS.values())
        torch.testing.assert_close(loss, losses[rank][0], atol=rounding(products, largest(loss)), rtol=0)
        (sum(of_rank for of_rank, _ in losses) / ranks).backward()
        of_weights = losses[rank][1].grad * ranks
        torch.testing.assert_close(weight.grad, of_weights, atol=rounding(products, largest(of_weights)), rtol=0)
        for (name, rows), rate in zip(grown.items(), learning_rates, strict=True):
            step = rate * rows.grad
            atol = rounding(products * ranks, largest(step)) + rounding(1, largest(rows))
            for piece in state[f"{name}_representation"].local_shards():
                first, size = piece.metadata.shard_offsets[0], piece.metadata.shard_sizes[0]
                expected = (rows.detach() - step)[first : first + size]
                torch.testing.assert_close(piece.tensor, expected, atol=atol, rtol=0)


def pooled_with_one_optimizer_and_with_two() -> None:
    pooled_as_alone((1.0, 1.0))
    pooled_as_alone((1.0, 0.5))


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_values_and_gradients_are_those_of_one_process(ranks: int) -> None:
    run_ranks(ranks, pooled_with_one_optimizer_and_with_two)
