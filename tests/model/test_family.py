"""Every model against its slow definition: what it keeps, what it predicts, every gradient; and what defines it."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.distributed.process_group import process_group
from embeddings.features import Rows
from embeddings.gradient_routing import Gradients, Ids, added
from embeddings.layers.scoring import DinScore
from embeddings.loss import click_loss
from embeddings.models import MODELS, build_model
from embeddings.planning import constraints
from embeddings.search.clusters import in_torch, log_counts
from embeddings.sizes import DataSizes
from jobs.runs import models
from schemas.model import ModelSettings, TableChange, TableSet
from schemas.settings import load_settings
from schemas.train import TrainSettings
from tests.model.definitions import DEFINITIONS, definition_of
from tests.tolerance import in_float64, largest, rounding, summands
from tests.toy_batch import toy_batch
from tests.toy_model import (
    ALL,
    CPU,
    MANY,
    OF_ANOTHER_SIZE,
    ONE,
    SGD,
    TWO,
    assert_gradients_equal,
    batch_of,
    load_values,
    local_values,
    model_of,
    named,
    settings_of,
    sharded_like,
    sizes_of,
    together,
)

SHAPES: dict[str, dict[str, object]] = {
    "one sequence": ONE,
    "two sequences, all features": TWO,
    "features of every kind": MANY,
    "auxiliary loss": {**TWO, "search": "local", "auxiliary_loss": True},
}
DIMS = {
    "features": ALL,
    "attention": TableSet(dim=4, features={"item": TableChange(dim=12), "position": TableChange(dim=8)}, **SGD),
    "representation": TableSet(dim=8, features={"scene": TableChange(dim=4)}, **SGD),
}
UNUSUAL: list[tuple[str, str, dict[str, object]]] = [
    ("dare", "dims of their own", DIMS),
    ("dare", "more retrieved than there is", {"retrieved": {"ads": 4, "content": 20}}),
    ("twin", "item alone", {"features": ("item",)}),
]
CASES = [
    *((name, shape) for name in DEFINITIONS for shape in SHAPES if (name, shape) != ("sdim", "auxiliary loss")),
    *((name, shape) for name, shape, _ in UNUSUAL),
]
BROAD = ("two sequences, all features", "features of every kind")


def some_slow(cases: Iterable[tuple[str, str]], is_slow: Callable[[str, str], bool]) -> list[Any]:
    return [pytest.param(*case, marks=[pytest.mark.slow] if is_slow(*case) else []) for case in cases]


def case_of(name: str, shape: str) -> ModelSettings:
    unusual = {(model, told): changes for model, told, changes in UNUSUAL}
    return settings_of(name, **(SHAPES[shape] if shape in SHAPES else unusual[name, shape]))


@pytest.mark.parametrize(
    ("name", "shape"),
    some_slow(
        CASES, lambda name, shape: name in OF_ANOTHER_SIZE and shape not in ("one sequence", "features of every kind")
    ),
)
def test_forward_and_every_gradient_equal_the_definition(name: str, shape: str) -> None:
    settings = case_of(name, shape)
    model, batch = model_of(settings).double(), batch_of(settings, seed=2)
    definition = definition_of(model)
    with in_float64():
        prediction = model(batch)
        click_loss(prediction, batch.label_T.double()).backward()
    allowed = partial(rounding, summands(model, batch), dtype=torch.float64)
    logits = [logit for logit in (prediction.logit_T, prediction.auxiliary_logit_T) if logit is not None]
    for ours, theirs in zip(logits, definition.logits(batch), strict=True):
        torch.testing.assert_close(ours, theirs, atol=allowed(largest(theirs)), rtol=0)
    definition.learn(batch)
    expected = assert_gradients_equal(model, definition, allowed)
    assert sum(largest(gradient) > 1e-6 for gradient in expected.values()) > 5


SEARCHING = [(name, shape) for shape in BROAD for name in DEFINITIONS if name != "sdim"]


@pytest.mark.parametrize(
    ("name", "shape"),
    some_slow(
        [*SEARCHING, *((name, shape) for name, shape, _ in UNUSUAL)],
        lambda name, shape: name in OF_ANOTHER_SIZE and shape == "two sequences, all features",
    ),
)
def test_search_keeps_what_the_definition_keeps(name: str, shape: str) -> None:
    settings = case_of(name, shape)
    model = model_of(settings, seed=3)
    definition, searched = definition_of(model), 0
    for seed in range(3):
        batch = batch_of(settings, seed)
        for sequence, selected in model.search(batch, model.tables.small_rows(CPU), model.start_search(batch)).items():
            for t in range(len(batch)):
                kept = selected.index_TK[t][selected.valid_TK[t]].tolist()
                assert kept == list(definition.retrieve(batch, sequence, t)), (sequence, t)
                searched += len(kept)
    assert searched > 50


@pytest.mark.parametrize(
    ("name", "shape"),
    some_slow(
        [*((name, shape) for shape in BROAD for name in MODELS), *((name, shape) for name, shape, _ in UNUSUAL)],
        lambda name, shape: shape == "two sequences, all features" or name in OF_ANOTHER_SIZE,
    ),
)
def test_one_sharded_process_equals_the_unsharded_model(name: str, shape: str) -> None:
    settings = case_of(name, shape)
    with process_group(CPU):
        sharded = sharded_like(model_of(settings))
        for seed, size in enumerate(({}, {"targets": 0}, {"longest": 0}, {"targets": 1})):
            # Each step begins with equal values, so that the rounding of one does not grow in the next.
            plain, batch = model_of(settings, seed=1 + seed), batch_of(settings, seed=4, **size)
            load_values(sharded, plain.state_dict())
            sharded.zero_grad()
            loss, expected = (click_loss(model(batch), batch.label_T) for model in (sharded, plain))
            allowed = partial(rounding, summands(plain, batch))
            assert torch.isfinite(loss)
            torch.testing.assert_close(loss, expected, atol=allowed(1 + largest(expected)), rtol=0)
            loss.backward()
            expected.backward()
            gradients = {key: weight.grad for key, weight in plain.named_parameters() if weight.grad is not None}
            atol = allowed(largest(*gradients.values()))
            dense = {key: weight.grad for key, weight in sharded.module.named_parameters() if "_bags." not in key}
            for key, weight in plain.named_parameters():
                if "_bags." in key:  # the step that the sharded tables have taken, SGD with a rate of 1
                    weight.data -= gradients.get(key, 0)
                elif weight.requires_grad:
                    torch.testing.assert_close(dense[key], gradients[key], atol=atol, rtol=0, msg=named(key))
            for key, value in together([local_values(sharded)]).items():
                after = plain.state_dict()[key]
                torch.testing.assert_close(value, after, atol=atol + allowed(largest(after)), rtol=0, msg=named(key))


def test_hard_search_returns_the_category_alone_while_there_are_enough() -> None:
    settings = settings_of("twin-hard")
    model, enough, few = model_of(settings), 0, 0
    for seed in range(20):
        batch = batch_of(settings, seed)
        history = batch.histories["ads"]
        chosen = model.search_locally(batch, {})["ads"]
        for t in range(len(batch)):
            window = history.features_M["category"][int(history.start_T[t]) : int(history.end_T[t])]
            there = int((window == batch.features_T["category"][t]).sum())
            kept = (
                history.features_M["category"][chosen.index_TK[t][chosen.valid_TK[t]]]
                == batch.features_T["category"][t]
            )
            assert len(kept) == min(4, len(window))
            assert int(kept.sum()) == min(4, there)
            enough, few = enough + (there >= 4), few + (there < 4 <= len(window))
    assert enough > 20
    assert few > 20


def test_hard_search_needs_categories() -> None:
    settings = settings_of("sim-hard", features=("item", "position"))
    with pytest.raises(ValueError, match="sim-hard searches by category; add category"):
        build_model(settings, sizes_of(settings))
    sizes = DataSizes.counted(items=50, categories=1, lengths={"ads": 12})
    with pytest.raises(ValueError, match="these data have 1 of them"):
        build_model(settings_of("twin-hard"), sizes)


def test_clusters_of_one_behaviour_are_twin() -> None:
    batch = batch_of(settings_of("twin"), seed=5)
    twin, clustered = model_of(settings_of("twin")), model_of(settings_of("twin-v2", cluster_size=1))
    for (key, ours), theirs in zip(clustered.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs), key
    assert torch.equal(clustered(batch).logit_T, twin(batch).logit_T)


@given(
    seed=st.integers(0, 10_000), size=st.integers(1, 12), dim=st.sampled_from([1, 3, 16]), distinct=st.integers(1, 60)
)
@settings(max_examples=40, deadline=None)
def test_clusters_are_the_same_in_torch_and_compiled(seed: int, size: int, dim: int, distinct: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    history = toy_batch(seed, longest=40, lengths={"history": 30}).histories["history"]
    # Rows that are equal, and coordinates whose sums are exact: no order of a sum matters.
    points = torch.randint(-8, 9, (distinct, dim), generator=draw).float()
    rows_MD = points[torch.randint(0, distinct, (len(history.item_M),), generator=draw)]
    # A logarithm in float32, by two libraries.
    ours, theirs = log_counts(rows_MD, history, size), in_torch(rows_MD, history, size)
    torch.testing.assert_close(ours, theirs, atol=rounding(1, 4.0), rtol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_clusters_are_bounded_and_count_every_behaviour(size: int) -> None:
    settings = settings_of("twin-v2", cluster_size=size, retrieved={"ads": 12})
    batch = batch_of(settings, seed=6)
    model = model_of(settings)
    chosen = model.search(batch, model.tables.small_rows(CPU), model.start_search(batch))["ads"]
    history = batch.histories["ads"]
    count_TK = chosen.log_count_TK.exp().round() * chosen.valid_TK
    assert int(count_TK.max()) <= size
    assert torch.equal(count_TK.sum(1).long(), history.end_T - history.start_T)


def test_two_readings_of_the_tables_train_as_twin_does() -> None:
    models = [model_of(settings_of(name, **TWO)).double() for name in ("twin", "twin-duplicated")]
    sides: list[tuple[Gradients, Gradients]] = []

    def watched(attention: Gradients, representation: Gradients, ids: Ids) -> Gradients:
        sides.append((attention, representation))
        return added(attention, representation, ids)

    models[1].combine = watched
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in models]
    steps, norm = 4, 0.0
    with in_float64():
        for step in range(steps):
            batch = batch_of(models[0].settings, seed=step)
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                click_loss(model(batch), batch.label_T.double()).backward()
                norm = max(norm, largest(*(weight.grad for weight in model.parameters() if weight.grad is not None)))
                optimizer.step()
    # Adam divides by no less than 1e-8: it makes that much more of a gradient that is rounding alone.
    atol = steps * 0.01 / 1e-8 * rounding(summands(models[0], batch), norm, torch.float64)
    for (key, ours), theirs in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=0, msg=named(key))
    attention, representation = sides[-1]
    assert attention.keys() == representation.keys()
    assert {"item_shared", "category_shared", "ads_position_shared", "content_scene_shared"} <= attention.keys()
    for side in (attention, representation):
        assert all(any(part.abs().max() > 0 for part in parts) for parts in side.values())


def test_an_unknown_model_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"must be one of .*twin-hard.*not 'tvin'"):
        build_model(settings_of("tvin"), sizes_of(settings_of("twin")))


def test_maps_need_the_features_that_they_map() -> None:
    settings = settings_of("twin-projection-position", features=("item", "category"))
    with pytest.raises(ValueError, match="twin-projection-position maps position"):
        build_model(settings, sizes_of(settings))


def test_sdim_takes_no_auxiliary_loss() -> None:
    settings = settings_of("sdim", auxiliary_loss=True, search="local")
    with pytest.raises(ValueError, match="sdim predicts from the whole history already"):
        build_model(settings, sizes_of(settings))


def test_empty_buckets_have_no_gradient() -> None:
    model = model_of(settings_of("sdim"))
    batch = batch_of(model.settings, seed=8, longest=3)
    (100 * model(batch).logit_T.sum()).backward()
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters() if weight.grad is not None)


def test_rounds_of_sdim_have_equal_widths() -> None:
    settings = settings_of("sdim", hash_bits=10)
    with pytest.raises(ValueError, match="multiple of hash_width, 3"):
        build_model(settings, sizes_of(settings))


def test_the_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    models(json=True)
    *lines, last = capsys.readouterr().out.splitlines()
    listed = {entry["name"]: entry for entry in json.loads(last)["models"]}
    assert list(listed) == list(MODELS)
    assert len(lines) == 1 + len(MODELS), "a header, and a line each"
    assert {listed[name]["tables"] for name in ("twin", "dare", "dare-three-tables", "twin-4e")} == {1, 2, 3, 4}
    assert all(entry["summary"] and "`" not in entry["summary"] for entry in listed.values())


def test_a_model_is_named_in_short() -> None:
    assert load_settings(TrainSettings, overrides=["model=eta", "model.hash_bits=8"]).model.name == "eta"


@pytest.mark.parametrize("name", MODELS)
def test_only_tables_that_shards_search_must_be_row_wise(name: str) -> None:
    model = build_model(settings_of(name), sizes_of(settings_of(name)), torch.device("meta"))
    # Four rows of categories leave one of three ranks without any.
    kinds = {table: found.sharding_types for table, found in constraints(model, "cpu", ranks=3).items()}
    expected = ["row_wise"] if model.searched == "shard" else ["table_wise"]
    assert {table: kind for table, kind in kinds.items() if table.startswith("category_")} == {
        f"category_{of_set}": expected for of_set in model.tables.inherent
    }


def test_a_perceptron_scores_many_behaviours_as_it_scores_few() -> None:
    torch.manual_seed(0)
    scoring = DinScore(8)
    # The authors' code: 36 hidden units on [q, k, q - k, q * k], then one score. Of a pair, the first layer multiplies
    # each behaviour's float once for each unit, and the second each unit once.
    assert [tuple(weight.shape) for weight in scoring.parameters()] == [(36, 32), (36,), (1,), (1, 36), (1,)]
    assert scoring.products(8) == 36 * 8 + 36
    target, many = Rows(torch.randn(5, 8), {}), Rows(torch.randn(5, 3 * scoring.HIDDEN, 8), {})
    few = many.inherent.split(scoring.HIDDEN, dim=1)
    expected = torch.cat([scoring(target, Rows(part_TKD, {})) for part_TKD in few], dim=1)
    # Both add up the products of four times the dim for each hidden unit, then the hidden units.
    allowed = rounding(4 * 8 + scoring.HIDDEN, 1 + largest(expected))
    torch.testing.assert_close(scoring(target, many), expected, atol=allowed, rtol=0)
