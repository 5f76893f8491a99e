"""What every model must stand: batches with nothing in them, targets without history, batches of another model."""

import dataclasses
from functools import partial

import pytest
import torch
import torch.distributed as dist

from embeddings.batch import Batch, History
from embeddings.distributed.process_group import process_group
from embeddings.gradient_routing import GradientNorms
from embeddings.initialization import initialize
from embeddings.loss import click_loss
from embeddings.models import MODELS, build_model
from embeddings.sharding import make_plan, shard
from schemas.model import ModelSettings
from tests.launcher import run_ranks
from tests.model.definitions import DEFINITIONS, definition_of
from tests.tolerance import in_float64, largest, rounding, summands
from tests.toy_batch import part, toy_batch
from tests.toy_model import ALL, CPU, META, TWO, batch_of, model_of, settings_of, sharded_like, sizes_of

CASES = {
    "dare": settings_of("dare", **TWO),
    "twin": settings_of("twin"),
    "twin-auxiliary": settings_of("twin", auxiliary_loss=True, search="local", **TWO),
    "twin-item-alone": settings_of("twin", features=("item",)),
}
EMPTY = {
    "no targets": {"targets": 0},
    "no users": {"targets": 0, "users": 0},
    "one target": {"targets": 1},
    "no behaviours": {"targets": 3, "longest": 0},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", EMPTY)
@pytest.mark.parametrize("case", CASES)
def test_empty_batches_give_finite_losses_and_gradients(case: str, shape: str, training: bool) -> None:
    settings = CASES[case]
    model = model_of(settings, dense=10).train(training)
    batch = batch_of(settings, seed=6, **EMPTY[shape])
    loss = click_loss(model(batch), batch.label_T)
    loss.backward()
    assert torch.isfinite(loss)
    assert len(batch) or loss == 0
    for name, weight in model.named_parameters():
        if training or "auxiliary" not in name:
            assert weight.grad is not None, name
            assert torch.isfinite(weight.grad).all(), name
            assert len(batch) or not weight.grad.any(), name


def without_histories(batch: Batch) -> Batch:
    nothing = torch.zeros(0, dtype=torch.int32)
    none_T = torch.zeros_like(batch.user_T)
    empty = History(
        item_M=nothing,
        timestamp_M=nothing.long(),
        features_M={"category": nothing, "behavior": nothing, "scene": nothing},
        offset_U=torch.zeros(len(batch.user_id_U) + 1, dtype=torch.int64),
        start_T=none_T,
        end_T=none_T,
    )
    return dataclasses.replace(batch, histories=dict.fromkeys(batch.histories, empty))


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_target_without_history_is_predicted_from_itself_alone(name: str) -> None:
    settings = settings_of(name, features=ALL)
    model = model_of(settings).double().eval()
    draw = torch.Generator().manual_seed(1)
    for key, statistic in model.state_dict().items():
        if "running_" in key:
            statistic.copy_(torch.rand(statistic.shape, generator=draw) + 0.5)
    batch = batch_of(settings, seed=6, targets=30, longest=4)
    (history,) = batch.histories.values()
    alone_T = history.start_T == history.end_T
    assert 3 < alone_T.sum() < 20
    with in_float64(), torch.no_grad():
        logit_T = model(batch).logit_T
    definition = definition_of(model)
    definition.training = False
    (expected_T,) = definition.logits(without_histories(batch))
    allowed = rounding(summands(model, batch), largest(expected_T), torch.float64)
    torch.testing.assert_close(logit_T[alone_T], expected_T[alone_T], atol=allowed, rtol=0)
    assert ((logit_T - expected_T)[~alone_T].abs() > 1e3 * allowed).sum() > 10
    # In evaluation, what is said of a target with a history does not depend on the others either.
    (expected_T,) = definition.logits(batch)
    torch.testing.assert_close(logit_T, expected_T, atol=allowed, rtol=0)


@pytest.mark.parametrize("name", ["dare", "twin"])
def test_three_steps_learn_a_planted_rule(name: str) -> None:
    settings = ModelSettings(name=name, retrieved={"history": 5})
    with process_group(CPU):
        model = build_model(settings, sizes_of(settings), META)
        sharded = shard(model, CPU, make_plan(model, CPU, batch_size=64))
        initialize(sharded, seed=1)
        dense = [weight for name, weight in sharded.named_parameters() if "embedding_bags" not in name]
        optimizer = torch.optim.Adam(dense, lr=0.01)
        batch = batch_of(settings, seed=7, targets=200, users=20)
        batch.label_T.copy_(batch.features_T["category"] > 1)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = click_loss(sharded(batch), batch.label_T)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.05


def test_a_batch_that_the_model_was_not_built_for_is_refused() -> None:
    model = model_of(settings_of("dare", retrieved={"history": 4}))
    with pytest.raises(ValueError, match=r"model.retrieved.history: not a sequence of toy batch 0; it has ads"):
        model(toy_batch(0, lengths={"ads": 12}))
    with pytest.raises(
        ValueError, match=r"toy batch 0: a history of \d+ behaviours in history; the model was built for 12"
    ):
        model(toy_batch(0, categories=3, lengths={"history": 25}))


@pytest.mark.parametrize("name", ["dare", "twin"])
def test_gradient_norms_are_told_apart_where_tables_are_shared(name: str) -> None:
    model = model_of(settings_of(name)).double()
    batch, definition = batch_of(model.settings, seed=2), definition_of(model)
    row_hook = GradientNorms()
    with in_float64():
        click_loss(model(batch, row_hook=row_hook), batch.label_T.double()).backward()
        norms = row_hook.norms()

    used: dict[str, list[torch.Tensor]] = {"attention": [], "representation": []}

    def spy(role: str, vectors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        views = {feature: vector.view_as(vector) for feature, vector in vectors.items()}
        for view in views.values():
            view.retain_grad()
        used[role] += views.values()
        return views

    definition.used_for = spy
    definition.learn(batch)
    allowed = partial(rounding, summands(model, batch), dtype=torch.float64)
    expected = {
        role: sum(vector.grad.square().sum().item() for vector in vectors if vector.grad is not None) ** 0.5
        for role, vectors in used.items()
    }
    for role, norm in expected.items():
        assert norms[role] == pytest.approx(norm, abs=allowed(max(expected.values())), rel=0), role
    assert expected["representation"] > expected["attention"] > 1e-3


@pytest.mark.parametrize("shape", [TWO, {**TWO, "search": "local", "auxiliary_loss": True}], ids=["plain", "auxiliary"])
@pytest.mark.parametrize("name", MODELS)
def test_measuring_changes_no_bit(name: str, shape: dict[str, object]) -> None:
    if MODELS[name].attends_all and "auxiliary_loss" in shape:
        pytest.skip("it predicts from the whole history already")
    settings = settings_of(name, **shape)
    batch, gradients = batch_of(settings, seed=3), []
    for row_hook in (None, GradientNorms()):
        model = model_of(settings)
        click_loss(model(batch, row_hook=row_hook), batch.label_T).backward()
        gradients.append({key: weight.grad for key, weight in model.named_parameters() if weight.grad is not None})
    assert row_hook is not None
    assert sum(row_hook.norms().values()) > 0
    for key, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][key]), key


def norms_of(search: str) -> dict[str, float]:
    settings = settings_of("dare", search=search, **TWO)
    sharded = sharded_like(model_of(settings))
    assert sharded.module.pools_on_shards == (search == "shard")
    batch = part(batch_of(settings, seed=3), dist.get_rank(), dist.get_world_size())
    row_hook = GradientNorms()
    click_loss(sharded(batch, row_hook=row_hook), batch.label_T).backward()
    return row_hook.norms()


@pytest.mark.slow
def test_norms_are_the_same_wherever_histories_are_pooled() -> None:
    shard, local = run_ranks(2, norms_of, "shard"), run_ranks(2, norms_of, "local")
    assert shard[0] == pytest.approx(local[0], rel=1e-4)
