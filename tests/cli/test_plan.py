"""Dry runs: what is planned, what does not fit, what is written and read again; and the command."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from embeddings.models import MODELS, build_model
from embeddings.sharding import shard
from embeddings.sizes import DataSizes, FeatureSize
from jobs.app import app
from jobs.planning import CLUSTERS
from pipeline.planning.dry_run import dry_run
from pipeline.planning.planned_tables import planned_tables
from pipeline.planning.sweep import axis, changed, remedies, sweep
from pipeline.planning.text import as_dict, report
from pipeline.planning.workload import with_load_of
from pipeline.runs.plan_file import differences, plan_text, read_plan
from schemas.cluster import ClusterSettings, known_clusters
from schemas.manifest import Counts, Manifest, TargetCounts
from schemas.settings import load_settings
from tests.launcher import run_ranks
from tests.plans import plan_settings
from tests.toy_batch import MORE

META = torch.device("meta")
CPU = torch.device("cpu")
SIZES = DataSizes.counted(items=100_000, categories=500, lengths={"history": 100})
TOO_MANY = DataSizes.counted(items=40_000_000, categories=500, lengths={"history": 100})


def test_every_declared_row_is_planned_once() -> None:
    run = dry_run(plan_settings(), SIZES)
    declared = {
        spec.name: tuple(weight.shape) for spec, weight in build_model(run.settings.model, SIZES, META).tables.weights()
    }
    assert {table.name: (table.rows, table.dim) for table in run.tables} == declared
    assert all(sum(table.shard_rows) == table.rows for table in run.tables)
    assert as_dict(run)["rows"] == sum(rows for rows, _ in declared.values())


@pytest.mark.parametrize("damage", ["table", "shard", "twice", "foreign"])
def test_a_plan_that_loses_rows_is_refused(damage: str) -> None:
    run = dry_run(plan_settings(), SIZES)
    assert run.plan is not None
    model = build_model(run.settings.model, SIZES, META)
    module = next(iter(run.plan.plan))
    tables = run.plan.plan[module]
    name = next(iter(tables))
    if damage == "table":
        del tables[name]
        message = f"the plan has no table {name}"
    elif damage == "foreign":
        tables["other"] = tables[name]
        message = "does not declare: other"
    else:
        tables = next(module for module in run.plan.plan.values() if any(name.startswith("item") for name in module))
        name = next(name for name in tables if name.startswith("item"))
        shards = tables[name].sharding_spec.shards
        if damage == "shard":
            shards.pop()
            message = f"values of table {name}"
        else:
            shards[1].shard_offsets = [0, 0]
            message = f"does not hold the rows of table {name}"
    with pytest.raises(ValueError, match=message):
        planned_tables(model, run.plan)


def test_bytes_with_optimizer_state() -> None:
    run = dry_run(plan_settings("model.representation.optimizer=adam", "model.representation.precision=fp16"), SIZES)
    size = {table.name: (table.weight_bytes, table.state_bytes) for table in run.tables}
    assert size["item_attention"] == (100_001 * 16 * 4, 100_001 * 4)
    assert size["item_representation"] == (100_001 * 32 * 2, 100_001 * 32 * 8)


def test_memory_of_ranks_holds_the_tables() -> None:
    run = dry_run(plan_settings(), SIZES)
    held = sum(table.bytes for table in run.tables)
    assert sum(rank.device_bytes for rank in run.ranks) > held
    assert sum(rank.lookups for rank in run.ranks) == pytest.approx(1)


def test_what_does_not_fit_is_named_and_the_remedies_fit() -> None:
    run = dry_run(plan_settings("cluster.device_memory=1.3GiB"), TOO_MANY)
    assert not run.feasible
    assert run.lack is not None
    assert run.lack.table == "item_representation"
    assert run.lack.needed > run.lack.usable
    # 40 M rows x (16 + 32) floats, and 4 bytes of state each, on 4 ranks.
    assert run.lack.needed >= 40_000_001 * (48 * 4 + 2 * 4) / 4
    proposed = list(remedies(run))
    assert [words.split("=")[0] for words in proposed] == [
        "cluster.nodes",
        "model.representation.dim",
        "model.attention.dim",  # together with representation
        "model.attention.precision",
        "model.representation.memory",  # attention is searched on the shards, and stays
    ]
    fits = [
        changed(run.settings, {"cluster": {"nodes": int(proposed[0].split("=")[1].split()[0])}}),
        changed(run.settings, {"model": {"representation": {"memory": "host"}}}),
    ]
    assert all(dry_run(settings, TOO_MANY).feasible for settings in fits)
    fewer = changed(run.settings, {"cluster": {"nodes": fits[0].cluster.nodes - 1}})
    assert not dry_run(fewer, TOO_MANY).feasible


def test_rows_in_host_memory_leave_the_device() -> None:
    on_device = dry_run(plan_settings(), SIZES)
    on_host = dry_run(plan_settings("model.representation.memory=host"), SIZES)
    assert {table.compute_kernel for table in on_host.tables if table.set == "representation"} == {"fused_uvm_caching"}
    assert {table.compute_kernel for table in on_host.tables if table.set == "attention"} == {"fused"}
    assert on_host.ranks[0].host_bytes > 0 == on_device.ranks[0].host_bytes
    assert on_host.step.ms > on_device.step.ms


def test_a_model_that_searches_locally_needs_room_for_it() -> None:
    shard, local = (dry_run(plan_settings(f"model.search={search}"), SIZES) for search in ("shard", "local"))
    assert max(rank.device_bytes for rank in local.ranks) > max(rank.device_bytes for rank in shard.ranks)


def test_a_plan_goes_through_a_file(tmp_path: Path) -> None:
    run = dry_run(plan_settings(), SIZES)
    assert run.plan is not None
    file = tmp_path / "plan.json"
    file.write_text(plan_text(run.plan))
    again = read_plan(file)
    assert differences(run.plan, again) == []
    assert plan_text(again) == file.read_text()
    other = dry_run(plan_settings("cluster.nodes=2", "model.representation.dim=16"), SIZES)
    assert other.plan is not None
    changes = differences(again, other.plan)
    assert "item_attention: ranks 0..3 -> 0..7" in changes
    assert "item_representation: dim 32 -> 16" in changes


@pytest.mark.parametrize("content", ["", "[]", '{"a": {}}', '{"a": 1}'])
def test_what_is_no_plan_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"not a sharding plan|if it is a sharding plan"):
        read_plan(file)


def on_cpu(nodes: int = 1, devices: int = 2) -> tuple[str, ...]:
    return (
        "cluster.device=cpu",
        "cluster.device_memory=0",
        f"cluster.nodes={nodes}",
        f"cluster.devices_per_node={devices}",
    )


def follow(file: Path) -> list[int]:
    """Rows of each table that this rank has."""
    settings = plan_settings(*on_cpu())
    model = shard(build_model(settings.model, SIZES, META), CPU, read_plan(file))
    return [
        sum(part.metadata.shard_sizes[0] for part in value.local_shards())
        for value in model.state_dict().values()
        if hasattr(value, "local_shards")
    ]


def test_training_follows_a_saved_plan(tmp_path: Path) -> None:
    run = dry_run(plan_settings(*on_cpu()), SIZES)
    assert run.plan is not None
    file = tmp_path / "plan.json"
    file.write_text(plan_text(run.plan))
    first, second = run_ranks(2, follow, file)
    assert sum(first) + sum(second) == sum(table.rows for table in run.tables)


def refusal(file: Path) -> str:
    try:
        follow(file)
    except ValueError as error:
        return str(error)
    return ""


def test_a_plan_for_other_ranks_or_devices_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    for overrides, message in (
        (on_cpu(devices=4), "of 2"),
        (on_cpu(devices=1), "over 1 ranks, these are 2"),
        (("cluster.devices_per_node=2",), "not for cpu"),
    ):
        plan = dry_run(plan_settings(*overrides), SIZES).plan
        assert plan is not None
        file.write_text(plan_text(plan))
        assert all(message in refused for refused in run_ranks(2, refusal, file)), message


def test_sweep() -> None:
    axes = [axis("attention_dim=16,32"), axis("ranks=2,8")]
    points = list(sweep(plan_settings(), SIZES, axes))
    assert [tuple(point.values()) for point, _ in points] == [(16, 2), (16, 8), (32, 2), (32, 8)]
    assert [run.settings.cluster.ranks for _, run in points] == [2, 8, 2, 8]
    fullest = [max(rank.device_bytes for rank in run.ranks) for _, run in points]
    assert fullest[0] > fullest[1]
    assert fullest[2] > fullest[0]


@pytest.mark.parametrize("text", ["depth=1", "ranks", "ranks=a", "ranks=0", "ranks="])
def test_sweeps_that_make_no_sense(text: str) -> None:
    with pytest.raises(ValueError, match="--sweep"):
        axis(text)


@pytest.mark.parametrize("name", known_clusters(CLUSTERS))
def test_shipped_clusters(name: str) -> None:
    cluster = load_settings(ClusterSettings, [known_clusters(CLUSTERS)[name]])
    assert cluster.name == name
    if "x" in name:
        nodes, devices = name.split("-")[1].split("x")
        assert (cluster.nodes, cluster.devices_per_node) == (int(nodes), int(devices))


def test_many_tables_on_a_thousand_ranks() -> None:
    settings = plan_settings(
        "model.features=[item,category,position,interval,behavior,scene]",
        "model.retrieved={ads: 20, content: 20}",
        "cluster.nodes=128",
        "cluster.devices_per_node=8",
        "cluster.device_memory=141GiB",
    )
    sizes = DataSizes.counted(
        items=4_999_000_000, categories=1_000_000, lengths={"ads": 400, "content": 600}, behaviors=4, scenes=3
    )
    began = time.process_time()  # not of the clock: a machine under load is not to blame
    run = dry_run(settings, sizes)
    assert run.feasible
    assert len(run.tables) == 20
    assert sum(table.rows for table in run.tables) >= 10**10
    assert time.process_time() - began < 60


def test_features_of_every_side_are_planned() -> None:
    few = plan_settings("model.features=[item,category,position]")
    names = "item,category,brand,tags,{name: maker, attention: false},price,position,query,dwell,age,interests,slot,bid"
    many = plan_settings(f"model.features=[{names}]", "model.context.dim=8")
    sizes = DataSizes.counted(items=100_000, categories=500, lengths={"history": 100})
    sizes = replace(sizes, features={**sizes.features, **MORE, "brand": FeatureSize("item", rows=200_000)})
    before, run = dry_run(few, sizes), dry_run(many, sizes)
    assert before.feasible
    assert run.feasible
    by_set = {
        of_set: {table.feature for table in run.tables if table.set == of_set} for of_set in ("attention", "context")
    }
    assert by_set == {
        "attention": {"item", "category", "brand", "tags", "position", "query"},
        "context": {"age", "interests", "slot"},
    }
    for where in ("shard", "local"):
        costs = {cost.what: cost for cost in run.steps[where].costs}
        assert costs["context"].ms > 0
        assert any(cost.within_node > 0 for what, cost in costs.items() if "of context" in what)
        assert run.steps[where].bytes_per_sample > before.steps[where].bytes_per_sample
    # A record of item, category and position has 15 + 9 + 7 bits, a word; brand and the bags of tags and query have 18,
    # 4 and 4 more.
    records = [
        sum(cost.within_node for cost in each.steps["shard"].costs if cost.what == "behaviours")
        for each in (before, run)
    ]
    assert records[1] == 2 * records[0]
    # Brands are too many to be gathered: a shard fetches the rows of those that it has met.
    assert any(cost.what == "rows of brand" for cost in run.steps["shard"].costs)


RUN = ("plan", "--topology", "a100-8", "sizes.items=1000000", "sizes.categories=1000")


def called(*arguments: str) -> tuple[str, BaseException | None]:
    result = CliRunner().invoke(app, list(arguments))
    return result.stdout, result.exception


def test_command_ends_with_one_object(tmp_path: Path) -> None:
    saved, page = tmp_path / "plan.json", tmp_path / "page.html"
    output, error = called(*RUN, "--json", "--save", str(saved), "--html", str(page), "cluster.price=2")
    assert error is None
    result = json.loads(output.splitlines()[-1])
    assert result["feasible"] is True
    assert result["ranks"] == 8
    assert {"seconds", "max_device_gib", "step_ms", "bytes_per_sample"} <= result.keys()
    assert {"name", "rows", "sharding_type", "bytes"} <= result["tables"][0].keys()
    assert set(result["step_ms"]) == set(result["bytes_per_sample"]) == {"shard", "local"}
    assert result["cost"] == pytest.approx(result["device_hours"] * 2, abs=0.02)
    # Names of XML namespaces are addresses too, but nothing is loaded from them.
    assert not re.search(r"""(src|href)=["']?https?:|@import|url\(["']?https?:""", page.read_text())
    assert page.read_text().count("<svg") == 3
    ids = re.findall(r'\bid="([^"]+)"', page.read_text())
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page.read_text())) <= {(name, "") for name in ids} | {
        ("", name) for name in ids
    }
    output, error = called(*RUN, "--diff", str(saved))
    assert error is None
    assert output.splitlines()[-1] == f"the same as {saved}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "--topology", "b300-8", "sizes.items=10"), "known are a100-8, h100-16x8"),
        (("plan", "--topology", "a100-8"), "no sizes to plan for"),
        ((*RUN, "cluster.nodes=0"), "cluster.nodes: input should be greater than 0"),
        ((*RUN, "cluster.speed=9"), "cluster.speed: unknown key"),
        ((*RUN, "cluster.device_memory=0"), "cluster.device_memory"),
        ((*RUN, "model.attention.dim=3"), "model.attention.dim"),
        ((*RUN, "--config", "nowhere.yaml"), "no such settings file"),
        ((*RUN, "--diff", "nowhere.json"), "no such plan"),
        ((*RUN, "--sweep", "ranks=12"), "nodes have 8 devices"),
        (("plan", "--topology", "laptop-cpu", "sizes.items=10", "model.attention.precision=fp16"), "needs CUDA"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str) -> None:
    _, error = called(*arguments)
    assert isinstance(error, ValueError)
    assert message.lower() in str(error).lower()


@pytest.mark.parametrize("content", ["name: [", "a: ${nowhere}", "3", "\x00"])
def test_a_topology_that_cannot_be_read_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    _, error = called("plan", "--topology", str(tmp_path / "mine.yaml"), "sizes.items=10")
    assert isinstance(error, ValueError)
    assert "mine.yaml: cannot be read: " in str(error)
    assert "\n" not in str(error)


WIDE = ("model.attention.dim=64", "model.representation.dim=64")


def test_command_says_what_to_change() -> None:
    output, error = called("plan", "--topology", "a100-8", "sizes.items=2_000_000_000", *WIDE, "--json")
    assert isinstance(error, ValueError)
    assert "the model does not fit a100-8: a rank lacks" in str(error)
    result = json.loads(output.splitlines()[-1])
    assert result["feasible"] is False
    assert result["remedies"]
    assert all(words in str(error) for words in result["remedies"])


def test_report_has_a_line_for_each_table() -> None:
    run = dry_run(plan_settings(), SIZES)
    lines = list(report(run))
    for table in run.tables:
        assert sum(line.startswith(f"{table.name} ") for line in lines) == 1
    assert all(len(line) < 200 for line in lines)


def test_a_data_set_says_how_many_targets_share_a_history() -> None:
    counts = Counts(
        users=10,
        users_left_out=0,
        events=800,
        behaviors=500,
        items=50,
        categories=5,
        items_with_changed_category=0,
        first_timestamp=0,
        last_timestamp=1,
        **{split: TargetCounts(targets=60, positives=20) for split in ("train", "validation", "test")},
    )
    manifest = Manifest.model_construct(counts=counts)
    load = with_load_of(plan_settings("stream.history_length=100"), manifest).workload
    assert (load.targets_per_user, load.filled) == (6, 0.5)
    load = with_load_of(
        plan_settings("stream.history_length=40", "stream.targets_per_user_per_batch=3", "workload.samples=7"), manifest
    ).workload
    assert (load.targets_per_user, load.filled, load.samples) == (3, 1, 7)
    load = with_load_of(plan_settings("workload.targets_per_user=2"), manifest).workload
    assert (load.targets_per_user, load.filled) == (2, 0.5)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_can_be_planned(name: str) -> None:
    run = dry_run(plan_settings(f"model={name}", "model.attention.dim=32"), SIZES)
    assert run.feasible
    assert (f"{name} searches" in "\n".join(report(run))) == (MODELS[name].searched != "shard")
    shard, local = (run.steps[where] for where in ("shard", "local"))
    assert 0 < shard.ms < 1e5
    chooses = MODELS[name].searched == "shard"
    assert (shard.ms == local.ms) == (not chooses)
    assert run.search == ("shard" if chooses else "local")
