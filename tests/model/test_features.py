"""Which features are of which side, what they need of a batch, and bags: distinct ones and their means."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.batch import Bags, Batch
from embeddings.models import MODELS, build_model
from embeddings.sizes import DataSizes, check_bounds, extremes, figures
from schemas.errors import UserError
from schemas.model import ModelSettings, TableSet
from tests.toy_batch import MORE
from tests.toy_model import MANY, META, batch_of, model_of, settings_of, sizes_of


def test_sides_come_from_the_data_and_keep_the_order_of_the_settings() -> None:
    sides = sizes_of(many := settings_of("twin", **MANY)).sides(many)
    assert sides.inherent == ("item", "category", "brand", "maker", "tags", "color")
    assert sides.cross == ("position", "behavior", "scene", "query", "coupons")
    assert sides.context == ("age", "campaigns", "interests", "slot")
    assert sides.numbers == ("price", "dwell", "discount")
    assert sides.context_numbers == ("income", "bid")
    assert sides.inherent_of(scored=True) == ("item", "category", "brand", "tags", "color")
    assert sides.cross_of(scored=True) == ("position", "scene", "query", "coupons")


@pytest.mark.parametrize("name", MODELS)
def test_a_set_of_attentions_own_has_no_table_of_what_attention_does_not_use(name: str) -> None:
    model = build_model(many := settings_of(name, **MANY), sizes_of(many), META)
    tables = model.tables.specs
    for of_set in model.tables.sets:
        alone = of_set not in model.roles.representation
        assert (f"maker_{of_set}" in tables) == (not alone)
        assert (f"ads_behavior_{of_set}" in tables) == (not alone)
        assert f"brand_{of_set}" in tables
        assert f"price_{of_set}" not in tables
    assert {"age_context", "interests_context", "slot_context", "campaigns_context"} <= tables.keys()
    assert model.tables.specs["age_context"].dim == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"features": ["item", "size"]},
            "model.features: size is not in this data set, which has item, position, .*tags",
        ),
        (
            {"features": ["item", "age"], "attention": TableSet(features={"age": {"dim": 8}})},
            r"model.attention.features.age: there is no such table: age belongs to users",
        ),
        (
            {"features": ["item", "price"], "representation": TableSet(features={"price": {"dim": 8}})},
            "there is no such table: price belongs to items, and stays a number",
        ),
        (
            {"features": ["item", "tags"], "context": TableSet(features={"tags": {"dim": 8}})},
            r"model.context.features.tags: there is no such table: tags belongs to items",
        ),
    ],
)
def test_impossible_features_are_refused_in_a_line(changes: dict, message: str) -> None:
    model = ModelSettings(name="dare", retrieved={"ads": 4}, **changes)
    with pytest.raises(UserError, match=message):
        build_model(model, sizes_of(model), META)


def test_maps_of_a_feature_need_it_in_attention() -> None:
    features = ["item", {"name": "category", "attention": False}]
    model = settings_of("twin-projection-category", features=features)
    with pytest.raises(UserError, match="maps category; add it to the features, with attention"):
        build_model(model, sizes_of(model), META)


def spoiled(batch: Batch, column: str, value: float, place: str) -> Batch:
    columns = {"targets": batch.features_T, "users": batch.features_U}
    of = columns[place] if place in columns else batch.histories[place].features_M
    of[column][1] = value
    return batch


@pytest.mark.parametrize(
    ("column", "value", "place", "message"),
    [
        ("brand", 10, "content", "toy batch 1: brand 10, but the brand tables have 10 rows"),
        ("brand", -1, "targets", "toy batch 1: brand -1, but the brand tables have 10 rows"),
        ("tags", 14, "ads", "toy batch 1: tags 14, but there are 14 bags"),
        ("query", 10, "targets", "toy batch 1: query 10, but there are 10 bags"),
        ("age", 8, "users", "toy batch 1: age 8, but the age tables have 8 rows"),
        ("interests", 13, "users", "toy batch 1: interests 13, but there are 13 bags"),
        ("slot", 6, "targets", "toy batch 1: slot 6, but the slot tables have 6 rows"),
    ],
)
def test_columns_of_every_kind_stay_within_their_tables(column: str, value: int, place: str, message: str) -> None:
    many = settings_of("dare", **MANY)
    sizes = sizes_of(many).used(many.feature_names)
    batch = batch_of(many, seed=1)
    check_bounds(batch, sizes)
    assert len(extremes(batch, sizes)) == figures(sizes)
    with pytest.raises(UserError) as refused:
        check_bounds(spoiled(batch, column, value, place), sizes)
    assert str(refused.value) == message


def test_a_number_that_is_none_is_a_mistake_of_the_program() -> None:
    for column, place in (("price", "targets"), ("dwell", "ads"), ("income", "users"), ("bid", "targets")):
        model = model_of(settings_of("dare", **MANY))
        with pytest.raises(AssertionError, match=f"a {column} that is not a finite number"):
            model(spoiled(batch_of(model.settings, seed=1), column, float("nan"), place))


def test_a_batch_must_have_what_the_model_uses() -> None:
    model = model_of(settings_of("dare", **MANY))
    batch = batch_of(model.settings, seed=1)
    del batch.histories["ads"].features_M["tags"]
    with pytest.raises(UserError, match=r"model.features: tags is not in the histories of toy batch 1"):
        model(batch)
    del batch.features_U["age"]
    with pytest.raises(UserError, match=r"model.features: age is not in the targets of toy batch 1"):
        model(batch)


def test_other_data_may_have_other_bags_but_no_other_ids() -> None:
    many = settings_of("dare", **MANY)
    sizes, batch = sizes_of(many).used(many.feature_names), batch_of(many, seed=1)
    tags = batch.bags["tags"]
    more = Bags(torch.cat([tags.offset_B1, tags.offset_B1[-1:] + 1]), torch.cat([tags.id_E, tags.id_E.new_tensor([3])]))
    other = replace(batch, bags={**batch.bags, "tags": more})
    other.features_T["tags"][0] = len(tags)
    check_bounds(other, sizes)
    more.id_E[-1] = 12
    with pytest.raises(UserError, match="tags 12, but the tags tables have 12 rows"):
        check_bounds(replace(batch, bags={**batch.bags, "tags": Bags(more.offset_B1, more.id_E)}), sizes)


def test_names_of_tables_do_not_meet() -> None:
    sizes = DataSizes.counted(items=9, categories=3, lengths={"ads": 12})
    sizes = replace(sizes, features={**sizes.features, "ads_position": MORE["brand"]})
    model = settings_of("twin", features=["item", "position", "ads_position"])
    with pytest.raises(UserError, match="two tables would be called ads_position_shared"):
        build_model(model, sizes, META)


@given(
    sizes=st.lists(st.integers(0, 5), max_size=8),
    numbers=st.lists(st.integers(0, 8), max_size=30),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_distinct_bags_have_the_means_of_their_rows(sizes: list[int], numbers: list[int], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    sets = [torch.randint(0, 7, (size,), generator=draw, dtype=torch.int32) for size in [0, *sizes]]
    bags = Bags(torch.tensor([0, *map(len, sets)]).cumsum(0), torch.cat(sets))
    number_X = torch.tensor([number % len(sets) for number in numbers], dtype=torch.int32)
    rows_Rd = torch.randn(7, 4, generator=draw, dtype=torch.float64)
    distinct = bags.distinct(number_X)
    assert len(distinct.offset_U1) - 1 == len({0, *number_X.tolist()})
    means = distinct.means(rows_Rd, distinct.id_E)[distinct.slot_X]
    nothing = rows_Rd.new_zeros(4)
    expected = [rows_Rd[sets[b].long()].mean(0) if len(sets[b]) else nothing for b in number_X.tolist()]
    torch.testing.assert_close(means, torch.stack(expected) if expected else rows_Rd[:0])
    lengths, ids = bags.each(number_X)
    assert lengths.tolist() == [len(sets[b]) for b in number_X.tolist()]
    assert ids.tolist() == [id for b in number_X.tolist() for id in sets[b].tolist()]
