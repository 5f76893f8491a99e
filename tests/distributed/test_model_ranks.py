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
from tests.tolerance import largest, rounding, summands
from tests.toy_batch import part, toy_batch
from tests.toy_model import local_values, together

CPU = torch.device("cpu")
RATE, EPSILON = 0.01, 1e-3
"""Adaptive optimizers divide by the gradient's size and epsilon: a small one would make steps of rounding alone."""
SETTINGS = {
    "dare": ModelSettings(
        features=("item", "category", "position", "interval", "scene"),
        retrieved={"ads": 4, "content": 6},
        attention=TableSet(dim=8, optimizer="sgd", learning_rate=1.0),
        representation=TableSet(optimizer="sgd", learning_rate=1.0),
    ),
    "twin": ModelSettings(
        name="twin",
        retrieved={"ads": 4, "content": 6},
        auxiliary_loss=True,
        search="local",
        attention=TableSet(epsilon=EPSILON),
        representation=TableSet(epsilon=EPSILON),
    ),
}
DENSE = {"dare": partial(torch.optim.SGD, lr=0.1), "twin": partial(torch.optim.Adam, lr=RATE, eps=EPSILON)}
ENLARGED = {"dare": 1.0, "twin": RATE / EPSILON}
"""What a step makes of the rounding of a gradient, at most."""
SIZES = DataSizes.counted(items=50, categories=7, behaviors=4, scenes=3, lengths={"ads": 12, "content": 9})
TARGETS = (24, 13, 1, 0, 24)
"""Targets of each step's global batch; with one target, all ranks but one have none."""


def train(name: str) -> dict[str, Any]:
    """A few steps; the losses of the global batches, and this rank's part of the model."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = build_model(SETTINGS[name], SIZES, torch.device("meta"))
    sharded = shard(model, CPU, make_plan(model, CPU, batch_size=200))
    initialize(sharded, seed=11)
    start = local_values(sharded)
    dense = [weight for name, weight in sharded.named_parameters() if "embedding_bags" not in name]
    optimizer = DENSE[name](dense)
    losses, gradient = [], 0.0
    for step, targets in enumerate(TARGETS):
        batch = part(toy_batch(step, targets=targets, lengths=dict(SIZES.lengths)), rank, ranks)
        optimizer.zero_grad()
        loss = click_loss(sharded(batch), batch.label_T)
        loss.backward()
        gradient = max(gradient, largest(*(weight.grad for weight in dense if weight.grad is not None)))
        optimizer.step()
        losses.append(sum_over_ranks(loss.detach()).item() / ranks)
    sharded.eval()
    batch = toy_batch(99, targets=8 * (rank == 0), lengths=dict(SIZES.lengths))
    return {
        "losses": losses,
        "start": start,
        "end": local_values(sharded),
        "logits": sharded(batch).logit_T.detach(),
        "largest gradient": gradient,
        "summands": summands(model, toy_batch(0, targets=24, lengths=dict(SIZES.lengths))),
    }


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_do_not_change_the_training(name: str, ranks: int) -> None:
    with process_group(CPU):
        alone = train(name)
    outcomes = run_ranks(ranks, train, name)
    # Each step rounds; what it changes of the weights is what the next one begins with.
    allowed = rounding(len(TARGETS) * alone["summands"], ENLARGED[name] * alone["largest gradient"])
    for outcome in outcomes:
        assert outcome["losses"] == pytest.approx(alone["losses"], rel=0, abs=allowed)
    torch.testing.assert_close(outcomes[0]["logits"], alone["logits"], atol=allowed, rtol=0)
    for moment, atol in (("start", 0.0), ("end", allowed)):
        expected, found = together([alone[moment]]), together([outcome[moment] for outcome in outcomes])
        assert found.keys() == expected.keys()
        for parameter, value in expected.items():
            torch.testing.assert_close(found[parameter], value, atol=atol, rtol=0)
    changed = together([alone["end"]]), together([alone["start"]])
    assert sum(largest(changed[0][key] - changed[1][key]) > 3 * allowed for key in changed[0]) > 10
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
