"""Several tasks: every model against its definition, the loss where probabilities round to 0 or 1, ranks, one task."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from embeddings.batch import Batch
from embeddings.distributed.collectives import sum_over_ranks
from embeddings.distributed.process_group import process_group
from embeddings.layers.mlp import logit_of_product
from embeddings.loss import click_loss, labels_of, task_losses, weighted_sum
from embeddings.model import Prediction
from embeddings.models import MODELS
from schemas.model import ModelSettings
from tests.launcher import run_ranks
from tests.model.definitions import definition_of
from tests.tolerance import in_float64, largest, rounding, summands
from tests.toy_batch import part
from tests.toy_model import (
    CPU,
    ONE,
    TWO,
    assert_gradients_equal,
    assert_trained_alike,
    batch_of,
    local_values,
    model_of,
    settings_of,
    sharded_like,
)

TASKS = ("click", {"name": "buy", "after": "click", "weight": 0.5}, {"name": "like", "weight": 3})
CHAIN = ("view", {"name": "click", "after": "view"}, {"name": "buy", "after": "click"})
MIXTURE = {"experts": 3, "hidden": [6, 5]}


def labeled(batch: Batch, settings: ModelSettings, seed: int, *, weights: bool = True) -> Batch:
    """The batch with a label for each task, some of them missing, and weights."""
    draw = torch.Generator().manual_seed(seed)
    labels = {
        task.name: torch.randint(-1, 2, (len(batch),), generator=draw).float() for task in settings.tasks
    } or batch.labels_T
    return replace(batch, labels_T=labels, weight_T=torch.rand(len(batch), generator=draw) if weights else None)


def loss_of(
    settings: ModelSettings, prediction: Prediction, batch: Batch, dtype: torch.dtype = torch.float32
) -> Tensor:
    labels = [label_T.to(dtype) for label_T in labels_of(batch, settings.tasks)]
    weight_T = None if batch.weight_T is None else batch.weight_T.to(dtype)
    return weighted_sum(task_losses(prediction, labels, weight_T), settings.tasks)


SHAPES: dict[str, dict[str, Any]] = {
    "shared bottom": {**ONE, "tasks": TASKS},
    "experts": {**ONE, "tasks": TASKS, "mixture": MIXTURE},
}
FEW: dict[str, dict[str, Any]] = {
    "a chain": {**ONE, "tasks": CHAIN},
    "experts of one task": {**ONE, "mixture": MIXTURE},
    "auxiliary loss": {**TWO, "tasks": TASKS, "mixture": MIXTURE, "search": "local", "auxiliary_loss": True},
}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, "experts") for name in MODELS),
        *((name, "shared bottom") for name in ("dare", "twin-gradient-normalization", "sdim", "sim-soft")),
        *(("dare", shape) for shape in FEW),
    ],
)
def test_every_task_and_every_gradient_equal_the_definition(name: str, shape: str) -> None:
    settings = settings_of(name, **(SHAPES | FEW)[shape])
    model, batch = model_of(settings, dense=8).double(), labeled(batch_of(settings, seed=2), settings, seed=7)
    definition = definition_of(model)
    with in_float64():
        prediction = model(batch)
        loss_of(settings, prediction, batch, torch.float64).backward()
    allowed = partial(rounding, summands(model, batch), dtype=torch.float64)
    theirs = definition.predictions(batch)
    ours = [logits for logits in (prediction.logits, prediction.auxiliary_logits) if logits]
    assert [len(logits) for logits in ours] == [max(1, len(settings.tasks))] * len(theirs)
    for logits, chances in zip(ours, theirs, strict=True):
        for logit_T, of_task in zip(logits, chances, strict=True):
            torch.testing.assert_close(logit_T, of_task.logit, atol=allowed(largest(of_task.logit)), rtol=0)
    definition.learn(batch)
    expected = assert_gradients_equal(model, definition, allowed)
    assert all(largest(gradient) > 0 for key, gradient in expected.items() if "prediction" in key)


@given(st.lists(st.tuples(st.floats(-12, 12), st.floats(-12, 12)), min_size=1, max_size=20))
def test_the_logit_of_a_product_is_that_of_the_probabilities(pairs: list[tuple[float, float]]) -> None:
    one_T, other_T = torch.tensor(pairs, dtype=torch.float64).T
    product_T = one_T.sigmoid() * other_T.sigmoid()
    torch.testing.assert_close(logit_of_product(one_T, other_T).sigmoid(), product_T, atol=1e-14, rtol=1e-9)


def test_the_loss_of_a_product_has_the_right_gradient() -> None:
    draw = torch.Generator().manual_seed(3)
    leaves = [(8 * torch.randn(40, generator=draw)).double().requires_grad_() for _ in range(2)]
    label_T = torch.randint(0, 2, (40,), generator=draw).double()

    def loss(one_T: Tensor, other_T: Tensor) -> Tensor:
        return click_loss(Prediction((logit_of_product(one_T, other_T),)), label_T)

    assert torch.autograd.gradcheck(loss, leaves, eps=1e-6, atol=1e-7)
    # By hand, of -log p: p - 1 through the product's own odds, which are far from rounding for the logits above.
    one_T, other_T = leaves
    p_T = one_T.sigmoid() * other_T.sigmoid()
    by_hand = torch.where(label_T > 0, one_T.sigmoid() - 1, p_T * (1 - one_T.sigmoid()) / (1 - p_T)) / 40
    (gradient,) = torch.autograd.grad(loss(one_T, other_T), [one_T])
    torch.testing.assert_close(gradient, by_hand.detach(), atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize("scale", [50.0, 200.0, 1e4])
def test_the_loss_of_a_product_stays_finite_where_probabilities_round(scale: float) -> None:
    signs = torch.tensor([[one, other] for one in (-1, 1) for other in (-1, 1)], dtype=torch.float32).T * scale
    for label in (0.0, 1.0):
        one_T, other_T = (part_T.clone().requires_grad_() for part_T in signs)
        loss = click_loss(Prediction((logit_of_product(one_T, other_T),)), torch.full((4,), label))
        loss.backward()
        assert torch.isfinite(loss)
        for leaf in (one_T, other_T):
            assert torch.isfinite(leaf.grad).all()
            assert (leaf.grad * (1 if label else -1) <= 0).all()
    # Certain of both, where p is exactly 1 in float32, and wrong: the loss is the log odds, not infinite.
    certain = click_loss(Prediction((logit_of_product(*(torch.full((1,), scale) for _ in range(2))),)), torch.zeros(1))
    assert float(certain) == pytest.approx(scale - 0.6931, rel=1e-3)


def test_one_task_is_the_model_without_tasks() -> None:
    plain, named = (model_of(settings_of("dare", tasks=tasks)) for tasks in ((), ("label",)))
    assert list(plain.state_dict()) == list(named.state_dict())
    batch = batch_of(plain.settings, seed=4)
    for model in (plain, named):
        loss_of(model.settings, model(batch), batch).backward()
    assert all(
        torch.equal(one.grad, other.grad) for one, other in zip(plain.parameters(), named.parameters(), strict=True)
    )
    # What `torch` itself makes of it, bit for bit.
    logit_T = plain(batch).logit_T
    total = torch.nn.functional.binary_cross_entropy_with_logits(logit_T, batch.label_T, reduction="sum")
    assert torch.equal(click_loss(Prediction((logit_T,)), batch.label_T), total * (1 / torch.tensor(float(len(batch)))))


def test_weights_and_labels_that_are_missing_count_as_repeated_and_removed_targets_do() -> None:
    logit_T, label_T = torch.randn(6), torch.tensor([1.0, 0, -1, 1, -1, 0])
    weight_T = torch.tensor([1.0, 3, 5, 0, 2, 2])
    ours = click_loss(Prediction((logit_T,)), label_T, weight_T)
    kept = [0, 1, 1, 1, 5, 5]
    torch.testing.assert_close(ours, click_loss(Prediction((logit_T[kept],)), label_T[kept]))
    assert float(click_loss(Prediction((logit_T,)), torch.full((6,), -1.0))) == 0
    assert float(click_loss(Prediction((logit_T,)), label_T, torch.zeros(6))) == 0


SHAPES_OF_STEPS = ({"targets": 24}, {"targets": 1}, {"targets": 13}, {"targets": 2, "longest": 1})


def train(name: str, shape: str) -> dict[str, Any]:
    """A few steps; losses of the global batches, and this rank's part of the model."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    settings = settings_of(name, **SHAPES[shape])
    plain = model_of(settings, tables=10, dense=5)
    sharded = sharded_like(plain)
    optimizer = torch.optim.SGD([value for key, value in sharded.named_parameters() if "_bags" not in key], lr=0.1)
    losses = []
    for step, size in enumerate(SHAPES_OF_STEPS):
        batch = labeled(batch_of(settings, 80 + step, **size), settings, step, weights=step != 2)
        batch = part(batch, rank, ranks)
        optimizer.zero_grad()
        loss = loss_of(settings, sharded(batch), batch)
        loss.backward()
        optimizer.step()
        losses.append(sum_over_ranks(loss.detach()).item() / ranks)
    return {"losses": losses, "end": local_values(sharded), "summands": summands(plain, batch_of(settings, 80))}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["dare", "twin-gradient-normalization", "sim-soft"])
def test_two_ranks_train_what_one_trains(name: str, shape: str) -> None:
    with process_group(CPU):
        alone = train(name, shape)
    outcomes = run_ranks(2, train, name, shape)
    allowed = rounding(len(SHAPES_OF_STEPS) * alone["summands"], 1.0)
    assert_trained_alike(outcomes, alone, allowed)
