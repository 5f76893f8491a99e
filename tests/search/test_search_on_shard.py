"""Search on the shards against search in one process, over 1 to 4 real ranks: the very same behaviours."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from embeddings.models import build_model
from embeddings.sharding import make_plan, shard
from embeddings.sizes import DataSizes
from embeddings.tables import specs
from schemas.model import ModelSettings, TableChange, TableSet
from schemas.settings import load_settings
from tests.launcher import run_ranks
from tests.toy_batch import MORE, toy_batch

CPU = torch.device("cpu")
ALL = ("item", "category", "position", "interval", "behavior", "scene")
EVERY = ["item", "category", "brand", {"name": "maker", "attention": False}, "color", "tags", "price", "position"]
EVERY += ["scene", "query", "coupons", "dwell"]
GATHERED_BYTES = specs.GATHERED_BYTES
CASES: dict[str, dict[str, Any]] = {
    # Dims whose roots are powers of 2, so that scores of small integers are exact.
    "paper": {"features": ("item", "category", "position"), "items": 50},
    "all": {"features": ALL, "items": 50, "lengths": {"history": 300}, "longest": 400},
    "sequences": {"features": ALL, "items": 301, "lengths": {"ads": 12, "content": 40}, "longest": 60},
    "item alone": {"features": ("item",), "items": 70_001},
    "no category": {"features": ("item", "interval", "scene"), "items": 6},
    "features of every kind": {"features": EVERY, "items": 50, "lengths": {"ads": 12, "content": 40}, "longest": 60},
    "features of every kind, by id": {"features": EVERY, "items": 50, "gathered_bytes": 0},
    "many categories": {"features": ("item", "category"), "items": 50, "categories": 300},
}
SHAPES: list[dict[str, int]] = [
    {},
    {"users": 1, "targets": 9},
    {"users": 30, "targets": 20},
    {"targets": 0},
    {"users": 0, "targets": 0},
    {"targets": 3, "longest": 0},
    {"targets": 1},
]


def settings_of(case: dict[str, Any]) -> ModelSettings:
    dims = {"item": 12, "category": 4} if "category" in case["features"] else {"item": 16}
    if case["features"] is EVERY:
        dims = {"item": 32, "category": 8, "brand": 8, "color": 8, "tags": 8}
    names = ModelSettings(features=case["features"]).feature_names
    changes = {feature: TableChange(dim=dims.get(feature, 4)) for feature in names if feature not in ("price", "dwell")}
    k = {name: 5 + 10 * number for number, name in enumerate(case.get("lengths", {"history": 12}))}
    tables = TableSet(features=changes)
    return ModelSettings(features=case["features"], attention=tables, representation=tables, retrieved=k)


def searched(name: str) -> int:
    """The number of selected behaviours; fails where a rank selects others than it would alone."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    case = CASES[name]
    settings, lengths = settings_of(case), case.get("lengths", {"history": 12})
    categories = case.get("categories", 7)
    sizes = DataSizes.counted(case["items"], categories, lengths, behaviors=4, scenes=3)
    sizes = replace(sizes, features={**sizes.features, **MORE})
    specs.GATHERED_BYTES = case.get("gathered_bytes", GATHERED_BYTES)
    alone = build_model(settings, sizes)
    draw = torch.Generator().manual_seed(3)
    for weight in alone.tables.parameters():
        weight.data.copy_(torch.randint(-1, 2, weight.shape, generator=draw))
    model = build_model(settings, sizes, torch.device("meta"))
    sharded = shard(model, CPU, make_plan(model, CPU, batch_size=200))
    for key, value in sharded.state_dict().items():
        for piece in value.local_shards() if hasattr(value, "local_shards") else []:
            first, rows = piece.metadata.shard_offsets[0], piece.metadata.shard_sizes[0]
            piece.tensor.copy_(alone.state_dict()[key][first : first + rows])

    count = 0
    draw = random.Random(5)
    for seed in range(6):
        # Each rank has a shape of its own, and one of them has no targets.
        shapes = [{} if seed < 2 else draw.choice(SHAPES) for _ in range(ranks)]
        mine = (
            {"longest": case.get("longest", 30)} | shapes[rank] | ({"targets": 0} if seed % ranks == rank > 0 else {})
        )
        shape = {"items": case["items"], "categories": categories, "lengths": lengths, "more": True}
        batch = toy_batch(100 * rank + seed, **shape, **mine)
        selected = model.search(batch, model.tables.small_rows(CPU), model.start_search(batch))
        cross = alone.tables.small_rows(CPU)
        expected = alone.search(batch, cross, alone.start_search(batch))
        assert list(selected) == list(expected)
        for sequence, chosen in expected.items():
            where = f"{name}, rank {rank} of {ranks}, seed {seed}, {sequence}"
            assert torch.equal(selected[sequence].valid_TK, chosen.valid_TK), where
            assert torch.equal(selected[sequence].index_TK, chosen.index_TK), where
            count += int(chosen.valid_TK.sum())
    return count


def search_all() -> dict[str, int]:
    return {name: searched(name) for name in CASES}


@pytest.mark.parametrize("ranks", [1, 3, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (2, 4))])
def test_any_number_of_ranks_finds_what_one_process_finds(ranks: int) -> None:
    for counts in run_ranks(ranks, search_all):
        assert min(counts.values()) > 50, counts


def test_auxiliary_loss_needs_local_search() -> None:
    with pytest.raises(ValueError, match=r"auxiliary_loss needs the rows of all behaviours: set model.search=local"):
        load_settings(ModelSettings, overrides=["auxiliary_loss=true"])
    assert load_settings(ModelSettings, overrides=["auxiliary_loss=true", "search=local"]).search == "local"
    with pytest.raises(ValueError, match="search: input should be 'shard' or 'local'"):
        load_settings(ModelSettings, overrides=["search=elsewhere"])
