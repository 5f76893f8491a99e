"""The latest behaviours beside those retrieved: every model against its definition, and ranks that pool on shards."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from embeddings.distributed.collectives import sum_over_ranks
from embeddings.distributed.process_group import process_group
from embeddings.loss import click_loss
from embeddings.models import MODELS
from tests.launcher import run_ranks
from tests.model.definitions import Definition
from tests.tolerance import in_float64, largest, rounding, summands
from tests.toy_batch import part
from tests.toy_model import CPU, TWO, batch_of, local_values, model_of, settings_of, sharded_like, together

RECENT: dict[str, Any] = {"retrieved": TWO["retrieved"], "recent": {"content": 3}}
MORE: dict[str, dict[str, Any]] = {
    "more than there are": {**TWO, "recent": {"content": 30, "ads": 2}},
    "all features": {**TWO, "recent": {"content": 3}},
    "auxiliary loss": {**RECENT, "search": "local", "auxiliary_loss": True},
}


def _named(name: str) -> Callable[[str], str]:
    return lambda message: f"{name}: {message}"


@pytest.mark.parametrize(
    ("name", "shape"), [*((name, RECENT) for name in MODELS), *(("dare", shape) for shape in MORE.values())]
)
def test_forward_and_every_gradient_equal_the_definition(name: str, shape: dict[str, Any]) -> None:
    settings = settings_of(name, **shape)
    model, batch = model_of(settings).double(), batch_of(settings, seed=2)
    definition = Definition.of(model)
    with in_float64():
        prediction = model(batch)
        click_loss(prediction, batch.label_T.double()).backward()
    allowed = partial(rounding, summands(model, batch), dtype=torch.float64)
    for ours, theirs in zip([*prediction.logits, *prediction.auxiliary_logits], definition.logits(batch), strict=True):
        torch.testing.assert_close(ours, theirs, atol=allowed(largest(theirs)), rtol=0)
    definition.learn(batch)
    learning = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    expected = {key: definition.state[key].grad for key in learning}
    atol = allowed(largest(*expected.values()))
    for key, weight in learning.items():
        torch.testing.assert_close(weight.grad, expected[key], atol=atol, rtol=0, msg=_named(key))
    without = model_of(settings_of(name, **{**shape, "recent": {}}))
    assert model.prediction.inputs > without.prediction.inputs
    if model.auxiliary is not None:
        assert without.auxiliary is not None
        assert model.auxiliary.inputs == without.auxiliary.inputs


def test_without_it_nothing_changes_and_names_stay() -> None:
    without = {**RECENT, "recent": {}}
    plain, other = (model_of(settings_of("dare", **shape)) for shape in ({"retrieved": TWO["retrieved"]}, without))
    assert list(plain.state_dict()) == list(other.state_dict())
    recent = model_of(settings_of("dare", **RECENT))
    assert list(plain.state_dict()) == list(recent.state_dict())


def test_a_sequence_that_is_not_retrieved_is_refused() -> None:
    with pytest.raises(ValueError, match=r"recent\.other: retrieved does not name other"):
        settings_of("dare", recent={"other": 3})


SHAPES = ({"targets": 24}, {"targets": 13}, {"targets": 1}, {"targets": 2, "longest": 1})


def train(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """A few steps; losses of the global batches, and this rank's part of the model."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    settings = settings_of(name, **RECENT, **changes)
    plain = model_of(settings, tables=10, dense=10)
    sharded = sharded_like(plain)
    optimizer = torch.optim.SGD([value for key, value in sharded.named_parameters() if "_bags" not in key], lr=0.1)
    losses = []
    for step, shape in enumerate(SHAPES):
        batch = part(batch_of(settings, 180 + step, **shape), rank, ranks)
        optimizer.zero_grad()
        loss = click_loss(sharded(batch), batch.label_T)
        loss.backward()
        optimizer.step()
        losses.append(sum_over_ranks(loss.detach()).item() / ranks)
    return {
        "losses": losses,
        "end": local_values(sharded),
        "summands": summands(plain, batch_of(settings, 180)),
        "pools_on_shards": sharded.module.pools_on_shards,
    }


@pytest.mark.parametrize(
    ("name", "changes", "pools"),
    [
        ("dare", {}, True),
        ("dare", {"search": "local"}, False),
        ("sim-soft", {}, False),
        *(
            pytest.param(name, {}, False, marks=pytest.mark.slow)
            for name in ("twin", "sdim", "twin-gradient-normalization")
        ),
    ],
)
def test_two_ranks_train_what_one_trains(name: str, changes: dict[str, Any], pools: bool) -> None:
    with process_group(CPU):
        alone = train(name, changes)
    outcomes = run_ranks(2, train, name, changes)
    assert [outcome["pools_on_shards"] for outcome in outcomes] == [pools] * 2
    allowed = rounding(len(SHAPES) * alone["summands"], 1.0)
    assert outcomes[0]["losses"] == pytest.approx(alone["losses"], rel=0, abs=allowed)
    ends = together([alone["end"]])
    for key, values in together([outcome["end"] for outcome in outcomes]).items():
        torch.testing.assert_close(
            values, ends[key], atol=allowed + rounding(1, largest(ends[key])), rtol=0, msg=_named(key)
        )
