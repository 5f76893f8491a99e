"""The same global batches on 1, 2 and 4 real ranks: the same losses, and the same model after them."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from embeddings.distributed.collectives import sum_over_ranks
from embeddings.distributed.process_group import process_group
from embeddings.initialization import initialize
from embeddings.loss import click_loss
from embeddings.models import build_model
from embeddings.sharding import make_plan, shard
from embeddings.sizes import DataSizes
from schemas.model import ModelSettings, TableSet
from tests.launcher import run_ranks
from tests.toy_batch import part, toy_batch

CPU = torch.device("cpu")
SETTINGS = {
    "dare": ModelSettings(
        features=("item", "category", "position", "interval", "scene"),
        retrieved={"ads": 4, "content": 6},
        attention=TableSet(dim=8, optimizer="sgd", learning_rate=1.0),
        representation=TableSet(optimizer="sgd", learning_rate=1.0),
    ),
    "twin": ModelSettings(name="twin", retrieved={"ads": 4, "content": 6}, auxiliary_loss=True, search="local"),
}
DENSE = {"dare": partial(torch.optim.SGD, lr=0.1), "twin": partial(torch.optim.Adam, lr=0.01)}
TOLERANCE = {"dare": 1e-6, "twin": 2e-3}
"""Of weights. Adaptive optimizers make a step of a gradient that is all rounding."""
SIZES = DataSizes(items=50, categories=7, behaviors=4, scenes=3, lengths={"ads": 12, "content": 9})
TARGETS = (24, 13, 1, 0, 24)
"""Of each step; with one target, all ranks but one have none."""


def train(name: str) -> dict[str, Any]:
    """A few steps; the losses of the global batches, and this rank's part of the model."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = build_model(SETTINGS[name], SIZES, torch.device("meta"))
    sharded = shard(model, CPU, make_plan(model, CPU, bags=200))
    initialize(sharded, seed=11)
    start = parts(sharded)
    dense = [weight for name, weight in sharded.named_parameters() if "embedding_bags" not in name]
    optimizer = DENSE[name](dense)
    losses = []
    for step, targets in enumerate(TARGETS):
        batch = part(toy_batch(step, targets=targets, lengths=dict(SIZES.lengths)), rank, ranks)
        optimizer.zero_grad()
        loss = click_loss(sharded(batch), batch.label_T)
        loss.backward()
        optimizer.step()
        losses.append(sum_over_ranks(loss.detach()).item() / ranks)
    sharded.eval()
    batch = toy_batch(99, targets=8 * (rank == 0), lengths=dict(SIZES.lengths))
    return {
        "losses": losses,
        "start": start,
        "end": parts(sharded),
        "scores": sharded(batch).logit_T.sigmoid().detach(),
    }


def parts(model: torch.nn.Module) -> dict[str, list[tuple[int, torch.Tensor]]]:
    """By name: (first row, values) of what this rank holds."""
    found = {}
    for name, value in model.state_dict().items():
        shards = value.local_shards() if hasattr(value, "local_shards") else None
        if shards is None:
            found[name] = [(0, value.clone())]
        else:
            found[name] = [(shard.metadata.shard_offsets[0], shard.tensor.clone()) for shard in shards]
    return found


def together(outcomes: list[dict[str, Any]], moment: str) -> dict[str, torch.Tensor]:
    whole = {}
    for name in outcomes[0][moment]:
        pieces = [piece for outcome in outcomes for piece in outcome[moment][name]]
        if "embedding_bags" in name:
            whole[name] = torch.cat([rows for _, rows in sorted(pieces, key=lambda piece: piece[0])])
        else:
            for _, replica in pieces:
                assert torch.equal(replica, pieces[0][1]), f"{name} differs between ranks"
            whole[name] = pieces[0][1]
    return whole


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_do_not_change_the_training(name: str, ranks: int) -> None:
    with process_group(CPU):
        alone = train(name)
    outcomes = run_ranks(ranks, train, name)
    for outcome in outcomes:
        assert outcome["losses"] == pytest.approx(alone["losses"], rel=1e-5, abs=1e-7)
    torch.testing.assert_close(outcomes[0]["scores"], alone["scores"], atol=1e-5, rtol=1e-5)
    for moment, tolerance in (("start", 0.0), ("end", TOLERANCE[name])):
        expected, found = together([alone], moment), together(outcomes, moment)
        assert found.keys() == expected.keys()
        for parameter, value in expected.items():
            torch.testing.assert_close(found[parameter], value, atol=tolerance, rtol=0)
    held = [sum(len(rows) for _, rows in outcome["end"][item_table(name)]) for outcome in outcomes]
    assert held == [-(-51 // ranks)] * (ranks - 1) + [51 - -(-51 // ranks) * (ranks - 1)]


def item_table(name: str) -> str:
    of = "shared" if name == "twin" else "attention"
    return f"tables.inherent.{of}.embedding_bags.item_{of}.weight"


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("rank 1 fails")


def test_a_failing_rank_is_reported() -> None:
    with pytest.raises(AssertionError, match="rank 1 fails"):
        run_ranks(2, fail_on_rank_1)
