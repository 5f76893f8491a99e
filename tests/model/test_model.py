"""DARE and TWIN against the slow reference: forward, every gradient, and what the fused optimizers make of it."""

from collections.abc import Callable

import pytest
import torch

from embeddings.batch import Batch
from embeddings.distributed.process_group import process_group
from embeddings.gradient_routing import GradientNorms
from embeddings.initialization import initialize
from embeddings.loss import click_loss
from embeddings.model import CtrModel
from embeddings.models import build_model
from embeddings.sharding import make_plan, shard
from embeddings.sizes import DataSizes
from schemas.model import ModelSettings, TableChange, TableSet
from tests.reference_models import ReferenceModel, correspondence
from tests.toy_batch import toy_batch

CPU = torch.device("cpu")
META = torch.device("meta")
ALL = ("item", "category", "position", "interval", "behavior", "scene")
PAPER = ("item", "category", "position")
ROWS = {"item": 51, "category": 8, "position": 13, "interval": 34, "behavior": 5, "scene": 4}

SGD = {"optimizer": "sgd", "learning_rate": 1.0}
CASES = {
    "dare": ModelSettings(
        retrieved={"history": 4}, attention=TableSet(dim=8, **SGD), representation=TableSet(dim=16, **SGD)
    ),
    "twin": ModelSettings(
        name="twin", retrieved={"history": 4}, attention=TableSet(**SGD), representation=TableSet(**SGD)
    ),
    "dare-features": ModelSettings(
        features=ALL,
        retrieved={"history": 4},
        attention=TableSet(dim=4, features={"item": TableChange(dim=12), "position": TableChange(dim=8)}, **SGD),
        representation=TableSet(dim=8, features={"scene": TableChange(dim=4)}, **SGD),
    ),
    "dare-sequences": ModelSettings(
        retrieved={"ads": 4, "content": 20},
        attention=TableSet(dim=8, **SGD),
        representation=TableSet(dim=4, **SGD),
    ),
    "dare-auxiliary": ModelSettings(
        auxiliary_loss=True,
        search="local",
        features=ALL,
        retrieved={"history": 4},
        attention=TableSet(**SGD),
        representation=TableSet(**SGD),
    ),
    "twin-auxiliary-sequences": ModelSettings(
        name="twin",
        auxiliary_loss=True,
        search="local",
        retrieved={"ads": 3, "content": 5},
        attention=TableSet(**SGD),
        representation=TableSet(**SGD),
    ),
    "twin-item-alone": ModelSettings(
        name="twin",
        features=("item",),
        retrieved={"history": 4},
        attention=TableSet(**SGD),
        representation=TableSet(**SGD),
    ),
}


def sizes_for(settings: ModelSettings) -> DataSizes:
    return DataSizes(items=50, categories=7, behaviors=4, scenes=3, lengths=dict.fromkeys(settings.retrieved, 12))


def batch_for(settings: ModelSettings, seed: int, **shape: int) -> Batch:
    return toy_batch(seed, lengths=dict.fromkeys(settings.retrieved, 12), **shape)


def spread(model: CtrModel, seed: int) -> None:
    """Weights large enough that every part of the model matters."""
    initialize(model, seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(30 if "embedding_bags" in name else 10 if "weight" in name and weight.dim() > 1 else 1)


def model_and_reference(settings: ModelSettings, seed: int) -> tuple[CtrModel, ReferenceModel]:
    model = build_model(settings, sizes_for(settings))
    spread(model, seed)
    reference = ReferenceModel(
        {feature: ROWS[feature] for feature in settings.features},
        {feature: settings.attention.table(feature).dim for feature in settings.features},
        {feature: settings.representation.table(feature).dim for feature in settings.features},
        settings.retrieved,
        shared=settings.name == "twin",
        auxiliary=settings.auxiliary_loss,
    )
    ours = model.state_dict()
    names = correspondence(reference)
    assert sorted(names.values()) == sorted(ours)
    reference.load_state_dict({theirs: ours[name] for theirs, name in names.items()}, strict=False)
    return model, reference.double()


def _named(name: str) -> Callable[[str], str]:
    return lambda message: f"{name}: {message}"


@pytest.mark.parametrize("case", CASES)
def test_forward_and_every_gradient_equal_the_reference(case: str) -> None:
    settings = CASES[case]
    model, reference = model_and_reference(settings, seed=1)
    batch = batch_for(settings, seed=2)
    prediction = model(batch)
    logit, auxiliary = reference(batch)
    torch.testing.assert_close(prediction.logit_T, logit.float(), atol=1e-5, rtol=1e-4)
    assert (auxiliary is None) == (prediction.auxiliary_logit_T is None)
    if auxiliary is not None:
        torch.testing.assert_close(prediction.auxiliary_logit_T, auxiliary.float(), atol=1e-5, rtol=1e-4)

    model, reference = model_and_reference(settings, seed=1)
    click_loss(model(batch), batch.label_T).backward()
    reference.loss(batch).backward()
    ours = dict(model.named_parameters())
    for theirs, name in correspondence(reference).items():
        if name in ours:
            expected = reference.get_parameter(theirs).grad
            assert expected.abs().max() > 1e-5, name
            # Sums of many terms that cancel: rounding is as large as the largest entries make it.
            atol = 1e-5 * float(expected.abs().max())
            torch.testing.assert_close(ours[name].grad, expected.float(), atol=atol, rtol=0, msg=_named(name))
    buffers = model.state_dict()
    for theirs, value in reference.named_buffers():
        if not theirs.endswith("num_batches_tracked"):
            torch.testing.assert_close(buffers[correspondence(reference)[theirs]], value.float())


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_the_fused_optimizers_equals_the_reference(case: str) -> None:
    settings = CASES[case]
    plain, reference = model_and_reference(settings, seed=3)
    optimizer = torch.optim.SGD(reference.embedding.parameters(), lr=1.0)
    with process_group(CPU):
        model = build_model(settings, sizes_for(settings), META)
        sharded = shard(model, CPU, make_plan(model, CPU, bags=64))
        load(sharded, plain.state_dict())
        for seed in range(3):
            batch = batch_for(settings, seed)
            loss = click_loss(sharded(batch), batch.label_T)
            loss.backward()
            expected = reference.loss(batch)
            torch.testing.assert_close(loss, expected.float(), atol=1e-6, rtol=1e-5)
            optimizer.zero_grad()
            expected.backward()
            optimizer.step()
        state = {name: local(value) for name, value in sharded.state_dict().items()}
    for theirs, name in correspondence(reference).items():
        if "embedding_bags" in name:
            torch.testing.assert_close(
                state[name], reference.state_dict()[theirs].float(), atol=2e-6, rtol=1e-4, msg=_named(name)
            )


def local(value: torch.Tensor) -> torch.Tensor:
    return value.local_shards()[0].tensor if hasattr(value, "local_shards") else value


def load(sharded: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in sharded.state_dict().items():
            for part in value.local_shards() if hasattr(value, "local_shards") else []:
                first, size = part.metadata.shard_offsets[0], part.metadata.shard_sizes[0]
                part.tensor.copy_(state[name][first : first + size])
            if not hasattr(value, "local_shards"):
                value.copy_(state[name])


def test_search_needs_no_gradient() -> None:
    settings = CASES["dare-features"]
    model, reference = model_and_reference(settings, seed=4)
    batch = batch_for(settings, seed=5)
    cross = model.tables.cross_rows(CPU)
    found = model.search(batch, cross)["history"]
    assert not found.index_TK.requires_grad
    history = batch.histories["history"]
    for target in range(len(batch)):
        places = found.index_TK[target][found.valid_TK[target]] - history.start_T[target]
        assert places.tolist() == reference.retrieve(batch, "history", target)


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
    model, _ = model_and_reference(settings, seed=1)
    model.train(training)
    batch = batch_for(settings, seed=6, **EMPTY[shape])
    loss = click_loss(model(batch), batch.label_T)
    loss.backward()
    assert torch.isfinite(loss)
    assert len(batch) or loss == 0
    for name, weight in model.named_parameters():
        if training or "auxiliary" not in name:
            assert weight.grad is not None, name
            assert torch.isfinite(weight.grad).all(), name
            assert len(batch) or not weight.grad.any(), name


def test_a_target_without_history_is_predicted_from_itself_alone() -> None:
    settings = CASES["dare"]
    model, _ = model_and_reference(settings, seed=1)
    model.eval()
    alone = batch_for(settings, seed=6, targets=4, longest=0)
    torch.testing.assert_close(model(alone).logit_T, model(alone).logit_T)
    assert model(alone).probability_T.shape == (4,)


@pytest.mark.parametrize("name", ["dare", "twin"])
def test_three_steps_learn_a_planted_rule(name: str) -> None:
    torch.manual_seed(0)
    settings = ModelSettings(name=name, retrieved={"history": 5})
    with process_group(CPU):
        model = build_model(settings, sizes_for(settings), META)
        sharded = shard(model, CPU, make_plan(model, CPU, bags=64))
        initialize(sharded, seed=1)
        dense = [weight for name, weight in sharded.named_parameters() if "embedding_bags" not in name]
        optimizer = torch.optim.Adam(dense, lr=0.01)
        batch = batch_for(settings, seed=7, targets=200, users=20)
        batch.label_T.copy_(batch.category_T > 3)
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
    model, _ = model_and_reference(CASES["dare"], seed=1)
    with pytest.raises(ValueError, match=r"model.retrieved.history: not a sequence of toy batch 0; it has ads"):
        model(toy_batch(0, lengths={"ads": 12}))
    with pytest.raises(
        ValueError, match=r"toy batch 0: a history of \d+ behaviours in history; the model was built for 12"
    ):
        model(toy_batch(0, lengths={"history": 25}))


@pytest.mark.parametrize("name", ["dare", "twin"])
def test_gradient_norms_are_told_apart_where_tables_are_shared(name: str) -> None:
    model, reference = model_and_reference(ModelSettings(name=name, retrieved={"history": 4}), seed=1)
    batch = batch_for(model.settings, seed=2)
    model.row_hook = GradientNorms()
    click_loss(model(batch), batch.label_T).backward()
    norms = model.row_hook.norms()

    used: dict[str, list[torch.Tensor]] = {"attention": [], "representation": []}
    look = reference.look

    def spy(concern: str, sequence: str, feature: str, row: torch.Tensor) -> torch.Tensor:
        rows = look(concern, sequence, feature, row)
        rows = rows.view_as(rows)
        rows.retain_grad()
        used[concern].append(rows)
        return rows

    reference.look = spy
    reference.loss(batch).backward()
    squares = {
        concern: sum(part.grad.square().sum().item() for part in rows if part.grad is not None)
        for concern, rows in used.items()
    }
    assert norms["attention"] == pytest.approx(squares["attention"] ** 0.5, rel=1e-4)
    # The reference looks a target up twice for its representation, and so splits that part of the gradient in two.
    assert norms["representation"] == pytest.approx(squares["representation"] ** 0.5, rel=0.2)
    assert norms["representation"] > norms["attention"]
