"""`dare plan`, `dare train`, `dare evaluate` and `dare score` decide alike what fits, and follow the same plan."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from embeddings import sharding
from embeddings.distributed.process_group import process_group
from embeddings.models import MODELS, build_model
from embeddings.planning import Machines, Placement, TablesDoNotFitError, plan_tables, usable
from embeddings.sharding import check_tables, machines_here, make_plan
from embeddings.sizes import DataSizes
from embeddings.workload import Workload
from jobs.app import app
from pipeline.evaluate.open_run import opened_run
from pipeline.planning.dry_run import dry_run
from pipeline.runs.plan_file import plan_text, read_plan
from schemas.manifest import Manifest
from schemas.settings import load_settings
from schemas.train import TrainSettings
from tests.datasets import random_users, write_dataset
from tests.launcher import run_ranks
from tests.plans import plan_settings
from tests.runs import Run, run_dare, small_settings

META, CPU = torch.device("meta"), torch.device("cpu")
GB, GIB, TIB = 10**9, 2**30, 2**40
SIZES = DataSizes.counted(items=1000, categories=7, lengths={"history": 30})

EXAMPLE = (
    "stream.history_length=10000",
    "stream.batch_size=512",
    "model.attention.dim=32",
    "model.representation.dim=64",
    "model.retrieved.history=50",
)
"""Of the example of docs/planning.md."""

ON_A_GPU = ("model.attention.dim=32", "model.representation.dim=32")


@pytest.mark.parametrize(
    ("machines", "topology", "settings", "sizes"),
    [
        (
            Machines("cuda", 1024, 8, usable(141 * GB), usable(2 * TIB // 8)),
            ("h200-128x8",),
            EXAMPLE,
            DataSizes.counted(items=2_000_000_000, categories=20_000, lengths={"history": 10_000}),
        ),
        (
            Machines("cuda", 1, 1, usable(80 * GIB), usable(TIB)),
            ("a100-8", "cluster.devices_per_node=1"),
            ON_A_GPU,
            DataSizes.counted(items=200_000_000, categories=10_000, lengths={"history": 200}),
        ),
    ],
    ids=["1,024 ranks", "one GPU of 80 GB"],
)
def test_training_plans_as_the_command_does(
    machines: Machines,
    topology: tuple[str, ...],
    settings: tuple[str, ...],
    sizes: DataSizes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Machines that are not at hand are made up; all else of training's planning is as it runs."""
    saved = tmp_path / "plan.json"
    sized = (f"sizes.items={sizes.items}", f"sizes.categories={sizes.rows('category') - 1}")
    told = CliRunner().invoke(app, ["plan", "--save", str(saved), "--topology", *topology, *settings, *sized])
    assert told.exception is None, told.output
    monkeypatch.setattr(sharding, "machines_here", lambda device: machines)
    training = load_settings(TrainSettings, [], list(settings))
    with process_group(CPU):
        plan = make_plan(build_model(training.model, sizes, META), CPU, training.stream.batch_size)
    assert plan_text(plan) == saved.read_text()


ON_CPU = ("model.attention.dim=32", "cluster.device=cpu", "cluster.device_memory=0")


def own_plans() -> dict[str, str]:
    plans = {}
    for name in MODELS:
        settings = plan_settings(f"model={name}", *ON_CPU)
        plan = make_plan(build_model(settings.model, SIZES, META), CPU, settings.stream.batch_size)
        plans[name] = plan_text(plan)
    return plans


def test_ranks_make_the_plan_that_a_dry_run_shows() -> None:
    shown = {}
    for name in MODELS:
        # On three ranks some of the small tables cannot be row-wise.
        run = dry_run(plan_settings(f"model={name}", *ON_CPU, "cluster.devices_per_node=3"), SIZES)
        assert run.plan is not None
        shown[name] = plan_text(run.plan)
    assert run_ranks(3, own_plans) == [shown] * 3


def placed(machines: Machines, *overrides: str, sizes: DataSizes = SIZES) -> Placement:
    settings = load_settings(TrainSettings, [], ["model.attention.dim=8", "model.representation.dim=16", *overrides])
    model = build_model(settings.model, sizes, META)
    return plan_tables(model, machines, Workload.of(settings.model.retrieved, sizes, machines.ranks, 64))


def test_the_largest_model_that_fits() -> None:
    """A byte less than what it needs is refused, and what it needs is enough."""
    ample = Machines("cuda", 4, 4, 80 * GIB, 80 * GIB)
    (needed,) = {max(placed(ample).device_bytes)}
    assert max(placed(Machines("cuda", 4, 4, needed, 80 * GIB)).device_bytes) == needed
    with pytest.raises(TablesDoNotFitError) as refused:
        placed(Machines("cuda", 4, 4, needed - 1, 80 * GIB))
    assert (refused.value.lack.needed, refused.value.lack.usable) == (needed, needed - 1)


@pytest.mark.parametrize(
    ("optimizer", "of_row", "of_value"),
    [("rowwise_adagrad", 4, 0), ("adagrad", 0, 4), ("adam", 0, 8), ("rowwise_adam", 4, 4)],
)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("memory", ["device", "host"])
def test_state_of_optimizers_is_counted_as_fbgemm_keeps_it(
    optimizer: str, of_row: int, of_value: int, precision: str, memory: str
) -> None:
    """By hand, as a difference to sgd, which has none: fp32 whatever the rows are; of rows always on the device."""
    machines = Machines("cuda", 1, 1, 80 * GIB, 80 * GIB)
    # Without categories: whether a step gathers their table depends on the optimizer.
    common = (
        "model.features=[item,position]",
        f"model.representation.precision={precision}",
        f"model.representation.memory={memory}",
    )
    plain, stateful = (
        placed(machines, *common, f"model.representation.optimizer={name}") for name in ("sgd", optimizer)
    )
    rows, dim = SIZES.rows("item") + SIZES.rows("position", "history"), 16
    on_device, on_host = rows * of_row, rows * dim * of_value
    if memory == "device":
        on_device, on_host = on_device + on_host, 0
    assert stateful.device_bytes[0] - plain.device_bytes[0] == on_device
    assert stateful.host_bytes[0] - plain.host_bytes[0] == on_host


def test_half_the_bytes_in_half_precision() -> None:
    machines = Machines("cuda", 1, 1, 80 * GIB, 80 * GIB)
    sizes = DataSizes.counted(items=1_000_000, categories=7, lengths={"history": 30})
    full, half = (placed(machines, f"model.attention.precision={kind}", sizes=sizes) for kind in ("fp32", "fp16"))
    # Beside the rows themselves, 2 bytes of each of the 8 values, there are those looked up in a step.
    assert full.device_bytes[0] - half.device_bytes[0] == pytest.approx(1_000_001 * 8 * 2, rel=0.01)


def test_a_search_on_the_shard_takes_no_memory_for_pairs() -> None:
    """Ten users with a tenth of N each, or one user with all of N: ten times the pairs, and all else alike."""
    machines, sizes = Machines("cuda", 1, 1, 80 * GIB, 80 * GIB), DataSizes.counted(1000, 7, {"history": 300})
    needed = {}
    for search in ("shard", "local"):
        model = build_model(plan_settings(f"model.search={search}").model, sizes, META)
        works = (Workload.of({"history": 20}, sizes, 1, 100, per_user, per_user / 10) for per_user in (1, 10))
        needed[search] = [plan_tables(model, machines, work).device_bytes[0] for work in works]
    assert needed["shard"][0] == needed["shard"][1]
    assert needed["local"][1] - needed["local"][0] == 100 * 300 * 0.9 * 8


def found_here() -> Machines:
    return machines_here(CPU)


def test_ranks_share_the_memory_of_their_host() -> None:
    with process_group(CPU):
        alone = machines_here(CPU)
    assert (alone.device, alone.ranks, alone.device_bytes) == ("cpu", 1, 0)
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < alone.host_bytes <= total * 0.85
    of_three = run_ranks(3, found_here)
    assert of_three == of_three[:1] * 3
    assert (of_three[0].ranks, of_three[0].ranks_per_node) == (3, 3)
    assert 0 < of_three[0].host_bytes <= total * 0.85 / 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planned") / "data"
    write_dataset(folder, random_users(60))
    return folder


def test_a_run_that_does_not_fit_ends_in_one_line(data: Path, tmp_path: Path) -> None:
    # 4 TB of rows, and none of them is made.
    large = tmp_path / "large"
    shutil.copytree(data, large)
    manifest = Manifest.read(large)
    counts = manifest.counts.model_copy(update={"items": 2**31 - 2})
    manifest.model_copy(update={"counts": counts}).write(large)
    settings = small_settings("model.attention.features={item: {dim: 512}}", "model.features=[item]")
    run = Run(2, settings, large, tmp_path / "run")
    assert set(run.wait()) == {1}
    line = run.complaint()
    for part in (
        "the model does not fit: a rank lacks",
        "TiB of host memory: it needs",
        "usable",
        "most for table item_attention (",
        "try more ranks, a smaller model.attention.dim",
        "; `dare plan` tells which change is enough",
    ):
        assert part in line


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        (("model.attention.memory=host",), "item_attention"),
        (("model.attention.features.category.memory=host",), "category_attention"),
        (("model=twin", "model.attention.memory=host", "model.representation.memory=host"), "item_shared"),
        (("model.attention.memory=host", "model.search=local"), None),
        (("model.attention.features.position.memory=host",), None),
        (("model.representation.memory=host",), None),
        (("model=sim-soft", "model.attention.memory=host", "model.representation.memory=host"), None),
    ],
)
def test_a_searched_table_must_be_on_the_device(overrides: tuple[str, ...], refused: str | None) -> None:
    settings = plan_settings("model.representation.dim=16", *overrides)

    def dry() -> None:
        assert dry_run(settings, SIZES).feasible

    def training() -> None:
        check_tables(build_model(settings.model, SIZES, META), "cuda")

    for decide in (dry, training):
        _accepts_or_names(decide, refused)


def _accepts_or_names(decide: Callable[[], None], refused: str | None) -> None:
    if refused is None:
        decide()
        return
    with pytest.raises(ValueError, match=r"model\.search=local") as error:
        decide()
    assert str(error.value).startswith(f"table {refused}: memory host")
    assert "\n" not in str(error.value)


def test_training_refuses_a_searched_table_in_host_memory(data: Path, tmp_path: Path) -> None:
    run = Run(1, small_settings("model.attention.memory=host"), data, tmp_path / "run")
    assert run.wait() == [1]
    assert "memory host cannot be searched with model.search=shard" in run.complaint()


def followed(run: Path, plan: Path | None) -> str:
    with opened_run(run, "test", "best", None, CPU, plan) as (model, _):
        return plan_text(model.plan)


@pytest.mark.slow
def test_evaluation_follows_a_plan(data: Path, tmp_path: Path) -> None:
    """The plan of the run on as many ranks, or the file's; with another number of ranks a new one."""
    run = Run(2, small_settings("epochs=1", "model.search=local"), data, tmp_path / "run").finish().folder
    made = (run / "plan.json").read_text()
    # No planner would make this one: a table with rows for all ranks that is whole on the second.
    moved = json.loads(made)
    del moved["checksum"]
    table = moved["category_representation"]
    table["sharding_type"], table["ranks"] = "table_wise", [1]
    rows, dim = (sum(part["sizes"][0] for part in table["shards"]), table["shards"][0]["sizes"][1])
    table["shards"] = [{"offsets": [0, 0], "sizes": [rows, dim], "placement": "rank:1/cpu"}]
    file = tmp_path / "moved.json"
    file.write_text(json.dumps(moved))
    text = plan_text(read_plan(file))
    assert text != made
    assert run_ranks(2, followed, run, None) == [made] * 2
    assert run_ranks(2, followed, run, file) == [text] * 2
    # As if the run had been trained by it.
    (run / "plan.json").write_text(text)
    assert run_ranks(2, followed, run, None) == [text] * 2
    (alone,) = run_ranks(1, followed, run, None)
    tables = [table for name, table in json.loads(alone).items() if name != "checksum"]
    assert {rank for table in tables for rank in table["ranks"]} == {0}
    for command in (["evaluate"], ["score", "--out", tmp_path / "out"]):
        code, _, errors = run_dare(tmp_path, *command, "--run", run, "--plan", file)
        assert code == 1
        assert "the sharding plan" in errors
