"""Table configs, settings and plans: what is declared, what is refused, and how tables start and learn."""

from dataclasses import replace

import pytest
import torch

from embeddings.distributed.process_group import process_group
from embeddings.initialization import BLOCK_ROWS, initialize
from embeddings.layers.mlp import GlobalBatchNorm
from embeddings.loss import click_loss
from embeddings.models import build_model
from embeddings.sharding import make_plan, shard
from embeddings.sizes import DataSizes, FeatureSize
from embeddings.tables.specs import TableSpec
from schemas.model import ModelSettings, Table, TableChange, TableSet
from schemas.settings import _notice, load_settings
from schemas.shards import FeatureRecord
from schemas.stream import HistorySequence, StreamSettings
from schemas.train import TrainSettings
from tests.tolerance import largest, rounding, summands
from tests.toy_batch import toy_batch

CPU = torch.device("cpu")
META = torch.device("meta")
SIZES = DataSizes.counted(items=50, categories=7, lengths={"history": 12})


def shapes(settings: ModelSettings, sizes: DataSizes) -> dict[str, tuple[int, ...]]:
    return {spec.name: tuple(weight.shape) for spec, weight in build_model(settings, sizes, META).tables.weights()}


def test_dare_declares_attention_and_representation_tables_twin_one_set() -> None:
    dims = {"attention": TableSet(dim=8), "representation": TableSet(dim=16)}
    assert shapes(ModelSettings(**dims), SIZES) == {
        "item_attention": (51, 8),
        "category_attention": (8, 8),
        "item_representation": (51, 16),
        "category_representation": (8, 16),
        "history_position_attention": (13, 8),
        "history_position_representation": (13, 16),
    }
    assert shapes(ModelSettings(name="twin"), SIZES) == {
        "item_shared": (51, 16),
        "category_shared": (8, 16),
        "history_position_shared": (13, 16),
    }


def test_other_features_and_sequences_have_tables_of_their_own() -> None:
    settings = ModelSettings(
        features=("item", "position", "interval", "behavior", "scene"),
        attention=TableSet(features={"position": TableChange(dim=4)}),
        retrieved={"ads": 5, "content": 20},
    )
    sizes = DataSizes.counted(items=50, categories=7, lengths={"ads": 40, "content": 60}, behaviors=4, scenes=3)
    found = shapes(settings, sizes)
    attention = {name: shape for name, shape in found.items() if name.endswith("_attention")}
    assert attention == {
        "item_attention": (51, 16),
        "ads_position_attention": (41, 4),
        "ads_interval_attention": (34, 16),
        "ads_behavior_attention": (5, 16),
        "ads_scene_attention": (4, 16),
        "content_position_attention": (61, 4),
        "content_interval_attention": (34, 16),
        "content_behavior_attention": (5, 16),
        "content_scene_attention": (4, 16),
    }
    assert found["ads_position_representation"] == (41, 16)


def test_a_tables_settings_are_its_sets_but_for_what_it_changes() -> None:
    tables = TableSet(dim=32, learning_rate=0.1, features={"category": TableChange(dim=8, optimizer="sgd")})
    assert tables.table("item") == Table(dim=32, learning_rate=0.1)
    assert tables.table("category") == Table(dim=8, learning_rate=0.1, optimizer="sgd")


@pytest.mark.parametrize(
    ("feature", "rows", "change", "gathered"),
    [
        # 4 MiB are 65,536 rows of 16 floats.
        ("category", 65_536, {}, True),
        ("category", 65_537, {}, False),
        ("category", 32_768, {"dim": 32}, True),
        ("category", 32_769, {"dim": 32}, False),
        # Looked-up rows are float32, whatever they are kept in.
        ("category", 65_537, {"precision": "fp16"}, False),
        ("category", 10, {"optimizer": "adagrad"}, True),
        ("category", 10, {"optimizer": "sgd"}, True),
        # Momentum moves rows whose gradient is 0, as most rows of a whole table are.
        ("category", 10, {"optimizer": "adam"}, False),
        ("category", 10, {"optimizer": "rowwise_adam"}, False),
        # Search on the shards goes by where the items' rows are.
        ("item", 10, {}, False),
        # Cross features have no ids to look rows up by.
        ("position", 10, {"optimizer": "adam"}, True),
        ("position", 1_000_000, {}, True),
    ],
)
def test_small_tables_are_gathered_unless_momentum_would_move_their_rows(
    feature: str, rows: int, change: dict[str, object], gathered: bool
) -> None:
    kind, sequence = ("inherent", None) if feature in ("item", "category") else ("cross", "history")
    assert TableSpec(kind, "attention", feature, sequence, rows, Table(**change)).gathered == gathered  # type: ignore[arg-type]


def test_huge_tables_cost_nothing_before_they_are_sharded() -> None:
    sizes = DataSizes.counted(items=10**10, categories=10**6, lengths={"history": 10_000})
    assert shapes(ModelSettings(), sizes)["item_attention"] == (10**10 + 1, 16)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attention.dim=15"], r"attention.dim: input should be a multiple of 4 \(not 15\)"),
        (["attention.optimizer=lion"], "attention.optimizer: input should be 'rowwise_adagrad', 'adagrad'"),
        (["attention.dimension=16"], "attention.dimension: unknown key; allowed here: dim, epsilon, features"),
        (["retrieved.history=0"], "retrieved.history: input should be greater than 0"),
        (["features=[category]"], "features must name item"),
        (["features=[item,item]"], "features must name each feature once"),
        (["attention.features.scene.dim=8"], "attention.features.scene: features does not name scene"),
    ],
)
def test_impossible_settings_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_settings(ModelSettings, overrides=overrides)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "tvin"}, r"model.name: must be one of dare, .*, twin-v2 \(not 'tvin'\)"),
        (
            {"name": "twin", "attention": TableSet(dim=8)},
            "model.attention: twin shares one set of tables; it must equal model.representation",
        ),
        ({"features": ("item", "scene")}, "model.features: scene is not in this data set"),
        ({"features": ("item", "behavior")}, "model.features: behavior is not in this data set"),
        ({"retrieved": {"ads": 3}}, r"model.retrieved: must name the stream's sequences, history \(not ads\)"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(ModelSettings(**settings), SIZES, META)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"optimizer": "adam"},
            "table category_attention: optimizer adam needs CUDA; on a CPU: rowwise_adagrad, adagrad",
        ),
        ({"optimizer": "rowwise_adam"}, "table category_attention: optimizer rowwise_adam needs CUDA"),
        ({"precision": "fp16"}, "table category_attention: precision fp16 needs CUDA; on a CPU: fp32"),
    ],
)
def test_what_only_cuda_has_is_refused_on_a_cpu(change: dict[str, str], message: str) -> None:
    settings = ModelSettings(attention=TableSet(features={"category": TableChange(**change)}))
    model = build_model(settings, SIZES, META)
    with process_group(CPU), pytest.raises(ValueError, match=message):
        shard(model, CPU, make_plan(model, CPU, batch_size=10))


def test_a_plan_of_another_model_is_refused() -> None:
    model = build_model(ModelSettings(), SIZES, META)
    with process_group(CPU):
        plan = make_plan(model, CPU, batch_size=10)
        larger = build_model(ModelSettings(), DataSizes.counted(items=51, categories=7, lengths={"history": 12}), META)
        with pytest.raises(ValueError, match=r"the sharding plan holds 816 values of table item_attention, .* 52 x 16"):
            shard(larger, CPU, plan)
        with pytest.raises(
            ValueError, match="the sharding plan is not of this model: category_attention, category_repr"
        ):
            shard(build_model(ModelSettings(name="twin"), SIZES, META), CPU, plan)


def test_sizes_follow_the_stream() -> None:
    declared = (
        FeatureRecord(name="category", of="item", kind="id", encoding="dictionary", rows=3),
        FeatureRecord(name="behavior", of="behavior", kind="id", encoding="dictionary", rows=2),
        FeatureRecord(name="tags", of="item", kind="ids", encoding="hash", rows=9, bags=4),
        FeatureRecord(name="age", of="user", kind="number", encoding="buckets", rows=8),
        FeatureRecord(name="price", of="item", kind="number", encoding="scale", rows=0),
    )

    class Manifest:
        largest_item = 5

    Manifest.declared = declared  # type: ignore[attr-defined]
    one = DataSizes.of(Manifest(), StreamSettings(history_length=7))  # type: ignore[arg-type]
    counted = DataSizes.counted(items=5, categories=3, behaviors=2, scenes=None, lengths={"history": 7})
    others = {
        "tags": FeatureSize("item", "ids", rows=9, bags=4),
        "age": FeatureSize("user", rows=8),
        "price": FeatureSize("item", "number"),
    }
    assert one == replace(counted, features={**counted.features, **others})
    sequences = {"ads": HistorySequence(length=4), "content": HistorySequence(length=6)}
    two = DataSizes.of(Manifest(), StreamSettings(sequences=sequences))  # type: ignore[arg-type]
    assert two.lengths == {"ads": 4, "content": 6}


def test_first_values_depend_on_the_seed_alone() -> None:
    sizes = DataSizes.counted(items=BLOCK_ROWS + 100, categories=7, lengths={"history": 12})
    states = []
    for seed in (1, 1, 2):
        model = build_model(ModelSettings(), sizes)
        initialize(model, seed)
        states.append({name: value for name, value in model.state_dict().items() if value.dim() == 2})
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name])
        assert not torch.equal(value, states[2][name])
        assert 0.005 < value.std() < 0.015, name
        assert abs(value.mean()) < 0.005
    item = states[0]["tables.inherent.attention.embedding_bags.item_attention.weight"]
    assert not torch.equal(item[:50], item[BLOCK_ROWS : BLOCK_ROWS + 50])


def initialize_widely(model: torch.nn.Module) -> None:
    """Weights so large that no gradient is lost in rounding."""
    initialize(model, seed=5)
    with torch.no_grad():
        for value in model.state_dict().values():
            for part in [shard.tensor for shard in value.local_shards()] if hasattr(value, "local_shards") else [value]:
                part.mul_(20 if part.dim() == 2 else 1)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
def test_fused_optimizers_step_as_defined(optimizer: str) -> None:
    settings = ModelSettings(
        attention=TableSet(optimizer=optimizer, learning_rate=0.3, epsilon=1e-7),
        representation=TableSet(optimizer=optimizer, learning_rate=0.2, epsilon=1e-7),
        retrieved={"history": 5},
    )
    batch = toy_batch(3)
    plain = build_model(settings, SIZES)
    initialize_widely(plain)
    click_loss(plain(batch), batch.label_T).backward()
    with process_group(CPU):
        model = build_model(settings, SIZES, META)
        sharded = shard(model, CPU, make_plan(model, CPU, batch_size=64))
        initialize_widely(sharded)
        click_loss(sharded(batch), batch.label_T).backward()
        after = {name: value for name, value in sharded.state_dict().items() if "embedding_bags" in name}
        gradients = [weight.grad for weight in plain.parameters() if weight.grad is not None]
        noise = rounding(summands(plain, batch), largest(*gradients))
        for name, weight in plain.named_parameters():
            if name not in after:
                continue
            gradient, rate = weight.grad, 0.3 if "attention" in name else 0.2
            size = gradient.square()
            if optimizer == "rowwise_adagrad":
                size = size.mean(1, keepdim=True)
            size = (size.sqrt() + 1e-7).expand_as(gradient)
            step = gradient if optimizer == "sgd" else gradient / size
            change = after[name].local_shards()[0].tensor - (weight - rate * step)
            # A normalised step has the rounding of a gradient and of its size, relative to that size. Where a gradient
            # is rounding alone (the target's own position is a constant), the step may be anything.
            allowed = torch.full_like(step, noise) if optimizer == "sgd" else 2 * noise / size
            clear = allowed < 0.25
            assert clear.any(), name
            excess = change.abs() - rate * allowed - rounding(1, largest(weight))
            assert excess[clear].max() < 0, name


def test_an_id_outside_of_its_table_is_an_error() -> None:
    with process_group(CPU):
        model = build_model(ModelSettings(), SIZES, META)
        sharded = shard(model, CPU, make_plan(model, CPU, batch_size=64))
        initialize(sharded, seed=5)
        batch = toy_batch(3)
        batch.item_T[4] = 1000
        with pytest.raises(ValueError, match=r"toy batch 3: item 1000, but the item tables have 51 rows"):
            sharded(batch)


@pytest.mark.parametrize("count", [2, 3, 50])
def test_batch_norm_equals_torchs(count: int) -> None:
    # In double precision: of two values that lie close together the gradient is mostly rounding in single precision.
    ours, theirs = GlobalBatchNorm(4).double(), torch.nn.BatchNorm1d(4).double()
    values = (torch.randn(count, 4, dtype=torch.float64) * 3 + 2).requires_grad_()
    copy = values.detach().clone().requires_grad_()
    for _ in range(2):
        a, b = ours(values), theirs(copy)
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    weight = torch.randn(count, 4, dtype=torch.float64)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    torch.testing.assert_close(values.grad, copy.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.running_mean_F, theirs.running_mean)
    torch.testing.assert_close(ours.running_variance_F, theirs.running_var)
    torch.testing.assert_close(ours.eval()(values), theirs.eval()(copy))


@pytest.mark.parametrize("count", [0, 1])
def test_batch_norm_of_one_target_or_none_uses_the_running_statistics(count: int) -> None:
    norm = GlobalBatchNorm(3)
    values = torch.randn(count, 3)
    torch.testing.assert_close(norm(values), norm.eval()(values))
    assert torch.equal(norm.running_mean_F, torch.zeros(3))


def test_the_former_name_of_local_search_is_still_read(caplog: pytest.LogCaptureFixture) -> None:
    _notice.cache_clear()
    for _ in range(2):
        settings = load_settings(TrainSettings, overrides=["model.search=home"])
        assert settings == load_settings(TrainSettings, overrides=["model.search=local"])
    assert caplog.messages == ["model.search=home is called model.search=local now; both mean the same"]
