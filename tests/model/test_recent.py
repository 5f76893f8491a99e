"""The latest behaviours beside those retrieved: every model against its definition, and ranks that pool on shards."""

from functools import partial
from typing import Any

import pytest
import torch

from embeddings.distributed.process_group import process_group
from embeddings.loss import click_loss
from embeddings.models import MODELS
from tests.launcher import run_ranks
from tests.model.definitions import definition_of
from tests.tolerance import in_float64, largest, rounding, summands
from tests.toy_model import (
    CPU,
    TWO,
    assert_gradients_equal,
    assert_trained_alike,
    batch_of,
    model_of,
    settings_of,
    train_on_this_rank,
)

RECENT: dict[str, Any] = {"retrieved": TWO["retrieved"], "recent": {"content": 3}}
MORE: dict[str, dict[str, Any]] = {
    "more than there are": {**TWO, "recent": {"content": 30, "ads": 2}},
    "all features": {**TWO, "recent": {"content": 3}},
    "auxiliary loss": {**RECENT, "search": "local", "auxiliary_loss": True},
}


@pytest.mark.parametrize(
    ("name", "shape"), [*((name, RECENT) for name in MODELS), *(("dare", shape) for shape in MORE.values())]
)
def test_forward_and_every_gradient_equal_the_definition(name: str, shape: dict[str, Any]) -> None:
    settings = settings_of(name, **shape)
    model, batch = model_of(settings).double(), batch_of(settings, seed=2)
    definition = definition_of(model)
    with in_float64():
        prediction = model(batch)
        click_loss(prediction, batch.label_T.double()).backward()
    allowed = partial(rounding, summands(model, batch), dtype=torch.float64)
    for ours, theirs in zip([*prediction.logits, *prediction.auxiliary_logits], definition.logits(batch), strict=True):
        torch.testing.assert_close(ours, theirs, atol=allowed(largest(theirs)), rtol=0)
    definition.learn(batch)
    assert_gradients_equal(model, definition, allowed)
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
    return train_on_this_rank(settings_of(name, **RECENT, **changes), SHAPES, seed=180)


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
    assert_trained_alike(outcomes, alone, allowed)
