"""`search: shard` and `search: local` train the same model, and read each other's checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint

from embeddings.distributed.collectives import sum_over_ranks
from embeddings.distributed.process_group import process_group
from embeddings.gradient_routing import GradientNorms
from embeddings.initialization import initialize
from embeddings.loss import click_loss
from embeddings.models import build_model
from embeddings.sharding import make_plan, shard
from embeddings.sizes import DataSizes
from schemas.model import ModelSettings, TableSet
from tests.launcher import run_ranks
from tests.tolerance import rounding, summands
from tests.toy_batch import part, toy_batch

CPU = torch.device("cpu")
SIZES = DataSizes.counted(items=50, categories=7, behaviors=4, scenes=3, lengths={"ads": 12, "content": 9})
TARGETS = (24, 13, 1, 0, 24)
"""Targets of each step's global batch; with one target, all ranks but one have none."""


def settings_of(name: str, where: str) -> ModelSettings:
    tables = TableSet(optimizer="sgd", learning_rate=1.0)
    return ModelSettings(
        name=name,
        search=where,
        features=("item", "category", "position", "interval", "behavior", "scene"),
        retrieved={"ads": 4, "content": 6},
        attention=tables,
        representation=tables,
    )


def sharded_model(name: str, where: str, seed: int = 11) -> torch.nn.Module:
    model = build_model(settings_of(name, where), SIZES, torch.device("meta"))
    sharded = shard(model, CPU, make_plan(model, CPU, batch_size=200))
    initialize(sharded, seed)
    with torch.no_grad():
        for key, value in sharded.state_dict().items():
            if "embedding_bags" in key:
                for piece in value.local_shards():
                    piece.tensor.mul_(50)
    return sharded


def losses_of(model: torch.nn.Module, watched: bool = False) -> list[float]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    losses = []
    for step, targets in enumerate(TARGETS):
        batch = part(toy_batch(step, targets=targets, lengths=dict(SIZES.lengths)), rank, ranks)
        row_hook = GradientNorms() if watched and step % 2 else None
        loss = click_loss(model(batch, row_hook=row_hook), batch.label_T)
        loss.backward()
        losses.append(sum_over_ranks(loss.detach()).item() / ranks)
    return losses


def trained(folder: Path) -> dict[str, Any]:
    """Losses of both ways; what one has saved, the other goes on with."""
    found: dict[str, Any] = {}
    for name in ("dare", "twin"):
        models = {where: sharded_model(name, where) for where in ("shard", "local")}
        assert list(models["shard"].state_dict()) == list(models["local"].state_dict())
        for where, model in models.items():
            found[f"{name} {where}"] = losses_of(model)
            checkpoint.save({"model": model.state_dict()}, checkpoint_id=folder / f"{name}-{where}")
        for where, other in (("shard", "local"), ("local", "shard")):
            # Other first values, so that what the checkpoint failed to replace would show.
            model = sharded_model(name, where, seed=12)
            checkpoint.load({"model": model.state_dict()}, checkpoint_id=folder / f"{name}-{other}")
            found[f"{name} {where} after {other}"] = losses_of(model)
        found[f"{name} watched"] = losses_of(sharded_model(name, "shard"), watched=True)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with process_group(CPU):
        return trained(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_shard_and_local_have_the_same_losses(ranks: int, alone: dict[str, Any], tmp_path: Path) -> None:
    found = alone if ranks == 1 else run_ranks(ranks, trained, tmp_path)[0]
    for name in ("dare", "twin"):
        model = build_model(settings_of(name, "local"), SIZES)
        added = summands(model, toy_batch(0, targets=24, lengths=dict(SIZES.lengths)))
        # Each step rounds, in the gradients as in the loss, and the next one begins with what it has changed.
        losses = alone[f"{name} local"]
        expected = pytest.approx(losses, rel=0, abs=rounding(len(TARGETS) * added, max(losses)))
        assert len(set(found[f"{name} local"])) == len(TARGETS)
        assert found[f"{name} shard"] == expected
        assert found[f"{name} watched"] == found[f"{name} shard"], "measuring gradients changes no bit"
        losses = alone[f"{name} local after shard"]
        later = pytest.approx(losses, rel=0, abs=rounding(2 * len(TARGETS) * added, max(losses)))
        assert found[f"{name} shard after local"] == later
        if ranks > 1:  # One rank's local search is what the others are compared with.
            assert found[f"{name} local"] == expected
            assert found[f"{name} local after shard"] == later


def test_a_plan_that_is_not_row_wise_is_refused() -> None:
    with process_group(CPU):
        model = build_model(settings_of("dare", "shard"), SIZES, torch.device("meta"))
        plan = make_plan(model, CPU, batch_size=200)
        plan.plan["tables.inherent.attention"]["category_attention"].sharding_type = "table_wise"
        with pytest.raises(
            ValueError, match=r"has table category_attention table_wise; model.search=shard needs row_wise"
        ):
            shard(model, CPU, plan)
