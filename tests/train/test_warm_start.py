"""A run that begins on another one's checkpoint: rows, optimizer states and predictions go on, whatever has grown."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from embeddings.distributed.process_group import process_group
from embeddings.initialization import initialize
from embeddings.sharding import sharded_model
from pipeline.evaluate.evaluate import predictions
from pipeline.evaluate.open_run import load_model
from pipeline.runs.checkpoint import checkpoints_in, final_path, last_checkpoint
from pipeline.runs.checkpoint_files import keys_in, load_values
from pipeline.runs.checkpoint_writer import CheckpointWriter
from pipeline.runs.run_folder import read_step_log
from pipeline.stream.data_set import DataSet
from pipeline.stream.history_stream import HistoryStream
from pipeline.train.run import train
from pipeline.train.trainer import Trainer
from pipeline.train.warm_start import open_source, start_from
from schemas.row_layout import LEAST_ROWS, RowLayout
from schemas.train import TrainSettings
from tests.featured_days import Days, write_days
from tests.launcher import run_ranks
from tests.runs import small_settings

CPU = torch.device("cpu")
ALL = "item,category,tags,brand,price,mass,action,scene,topics,dwell,city,langs,age,slot,bid,position,interval"
MODELS = {
    # One set of tables for all; two; one with local search and hashes; each with another optimizer.
    "dare": ("model.context.optimizer=adagrad", "model.attention.features={tags: {optimizer: sgd}}"),
    "twin": (
        *(
            f"model.{role}.{setting}"
            for role in ("attention", "representation")
            for setting in ("dim=8", "optimizer=adagrad")
        ),
    ),
    "sdim": (
        *(f"model.{role}.dim=8" for role in ("attention", "representation")),
        "model.hash_bits=12",
        "model.context.optimizer=sgd",
    ),
}


def settings_of(model: str = "dare", *more: str) -> TrainSettings:
    return small_settings(
        "epochs=1",
        f"model.name={model}",
        f"model.features=[{ALL}]",
        "checkpoint.every=4",
        "validation.every=4",
        "stream.batch_size=12",
        *MODELS[model],
        *more,
    )


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """What the first of some ranks returns."""
    if ranks > 1:
        return run_ranks(ranks, function, *arguments)[0]
    with process_group(CPU):
        return function(*arguments)


def trained(settings: TrainSettings, data: Path, folder: Path, source: Path | None = None) -> None:
    train(settings, data, folder, CPU, source=source)


def begun(settings: TrainSettings, data: Path, source: Path, folder: Path) -> list[float]:
    """Begin on a run, save the state, and return the logits of the test's targets."""
    data_set, world = DataSet.open(data), (dist.get_rank(), dist.get_world_size())
    model = sharded_model(settings, data_set.manifest, CPU)
    opened = partial(HistoryStream, data, seed=1, rank=world[0], world=world[1], features=settings.model.read_features)
    with (
        opened(split="train", settings=settings.stream, shuffle=True) as stream,
        opened(split="test", settings=settings.stream, shuffle=False) as test,
    ):
        trainer = Trainer(settings, model, stream, None, CPU)
        start_from(open_source(source, settings, data_set), trainer, settings, data_set)
        assert trainer.step == 0
        with CheckpointWriter(folder, 9, {}) as writer:
            writer.save(trainer.state_dict(), 0, None)
            writer.wait()
        dist.barrier()
        return [logit for _, logits in predictions(trainer.model, test, CPU) for logit in logits[0].tolist()]


def predicted(settings: TrainSettings, data: Path, checkpoint: Path) -> list[float]:
    """Logits of the test's targets by a checkpoint."""
    model = sharded_model(settings, DataSet.open(data).manifest, CPU)
    load_model(model, checkpoint)
    with HistoryStream(
        data,
        "test",
        settings.stream,
        seed=1,
        shuffle=False,
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        features=settings.model.read_features,
    ) as stream:
        return [logit for _, logits in predictions(model, stream, CPU) for logit in logits[0].tolist()]


def values_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole, by key; those of parameters and optimizers."""
    with process_group(CPU):
        values = {
            key: torch.full(shape, torch.nan)
            for key, shape in keys_in(checkpoint).items()
            if shape is not None and key.split(".")[0] in ("model", "table_optimizer", "dense_optimizer")
        }
        load_values(values, checkpoint)
    return values


def checkpoint_of(run: Path) -> Path:
    found = last_checkpoint(run / "checkpoints")
    assert found is not None
    return found.path


def checkpoint_step(run: Path) -> int:
    return int(checkpoint_of(run).name.removeprefix("step-"))


def initial(settings: TrainSettings, data: Path, day: int) -> dict[str, torch.Tensor]:
    """The tables as they are drawn."""
    with process_group(CPU):
        model = sharded_model(settings, DataSet.open(data).manifest, CPU)
        initialize(model, settings.seed, day)
        return {
            f"model.{key}": value.local_shards()[0].tensor.clone()
            for key, value in model.state_dict().items()
            if "embedding_bags" in key
        }


def feature_of(key: str) -> str:
    """The feature of a table, by its key."""
    name = key.split(".embedding_bags.")[1].split(".")[0]
    return name.removeprefix("history_").rsplit("_", 1)[0]


def check_all_goes_on(days: Days, before: Path, after: Path, drawn: dict[str, torch.Tensor]) -> None:
    """Compare the state of a run with that of the run which it has begun on, by raw ids."""
    old, new = values_of(before), values_of(after)
    assert old.keys() == new.keys()
    kept, fresh = days.kept, days.new
    assert len(kept) > 20
    assert len(fresh) > 20
    assert {*days.reused, *days.moved} < fresh.keys()
    moved = 0
    for key, was in old.items():
        now = new[key]
        assert now.dtype == was.dtype
        if ".embedding_bags." not in key:
            assert torch.equal(now, was), key
            continue
        feature, state = feature_of(key), key.startswith("table_optimizer")
        first = torch.zeros_like(now) if state else drawn[key]
        if feature == "item":
            place_K = torch.tensor(list(kept.values()))
            assert torch.equal(now[place_K[:, 1]], was[place_K[:, 0]]), key
            assert torch.equal(now[0], was[0]), key
            place_F = torch.tensor(list(fresh.values()))
            assert torch.equal(now[place_F], first[place_F]), key
            moved += int((place_K[:, 0] != place_K[:, 1]).sum())
            assert not state or was[place_K[:, 0]].any(), "nothing was learnt"
        else:
            # Ids of features stay, and so do positions and intervals.
            assert torch.equal(now[: len(was)], was), key
            assert torch.equal(now[len(was) :], first[len(was) :]), key
            if feature in days.encoders[0].ids:
                ids = [each.ids[feature] for each in days.encoders]
                assert (len(was), len(now)) == (1 + len(ids[0]), 1 + len(ids[1]))
                assert len(now) > len(was)
                assert ids[0].items() <= ids[1].items()
    before, after = (RowLayout.of(each.largest_row) for each in days.encoders)
    if after.stripes > 1:
        assert bool(moved) == ((before.stripes, before.height) != (after.stripes, after.height))


@dataclass
class Case:
    days: Days
    settings: TrainSettings
    run: Path
    """Trained on the first day."""
    ranks: int


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    made: dict[Any, Case] = {}
    days: dict[Any, Days] = {}

    def case(ranks: int, model: str, largest: tuple[int, int], text: bool = True) -> Case:
        key = ranks, model, largest, text
        if key not in made:
            folder = tmp_path_factory.mktemp("warm")
            if key[2:] not in days:
                days[key[2:]] = write_days(folder, largest, text=text)
            settings = settings_of(model)
            on_ranks(ranks, trained, settings, days[key[2:]].folders[0], folder / "run")
            made[key] = Case(days[key[2:]], settings, folder / "run", ranks)
        return made[key]

    return case


SMALL = (60, 90)
SIZES = {
    "one stripe": SMALL,
    "becomes striped": (LEAST_ROWS - 40, LEAST_ROWS + 3000),
    "striped": (LEAST_ROWS, LEAST_ROWS + 9000),
    "as large as before": (LEAST_ROWS + 5, LEAST_ROWS + 40),
}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("ranks", "then", "model", "size", "text"),
    [
        pytest.param(2, 1, "dare", "becomes striped", True, marks=slow),
        (2, 3, "dare", "becomes striped", True),
        (1, 2, "twin", "striped", False),
        (1, 1, "sdim", "one stripe", True),
        *(
            pytest.param(ranks, then, "dare", size, text, marks=slow)
            for ranks in (1, 2, 3)
            for then in (1, 2, 3)
            for size, text in (("striped", False), ("as large as before", True))
        ),
        *(pytest.param(2, 3, model, "striped", True, marks=slow) for model in MODELS),
        *(pytest.param(3, 2, model, "one stripe", False, marks=slow) for model in MODELS),
    ],
)
def test_every_row_and_its_state_go_on(
    cases: Callable[..., Case], tmp_path: Path, ranks: int, then: int, model: str, size: str, text: bool
) -> None:
    case = cases(ranks, model, SIZES[size], text)
    logits = on_ranks(then, begun, case.settings, case.days.folders[1], case.run, tmp_path / "checkpoints")
    drawn = initial(case.settings, case.days.folders[1], day=1)
    check_all_goes_on(case.days, checkpoint_of(case.run), final_path(tmp_path / "checkpoints", 0), drawn)
    # Before the first step it is the old model: targets and histories are of old items alone.
    assert logits == on_ranks(then, predicted, case.settings, case.days.folders[0], checkpoint_of(case.run))
    assert len({*logits}) > 3


def test_a_run_with_a_table_on_one_rank_goes_on(cases: Callable[..., Case], tmp_path: Path) -> None:
    """Only the rank of a table that is whole has the state of its optimizer."""
    case = cases(2, "dare", SIZES["becomes striped"])
    shutil.copytree(case.run, tmp_path / "run")
    on_ranks(2, trained, settings_of("dare", "epochs=2"), case.days.folders[0], tmp_path / "run")
    steps = [line["step"] for line in read_step_log(tmp_path / "run" / "losses.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) == 2 * checkpoint_step(case.run)


def test_on_a_delta(cases: Callable[..., Case], tmp_path: Path) -> None:
    """The last checkpoint may hold the rows alone that have changed since the full one."""
    days = cases(2, "dare", SIZES["becomes striped"]).days
    settings = settings_of("dare", "epochs=4", "checkpoint.every=5", "checkpoint.delta_every=2", "checkpoint.keep=9")
    on_ranks(2, trained, settings, days.folders[0], tmp_path / "run")
    there = checkpoints_in(tmp_path / "run" / "checkpoints")
    last_delta = max(checkpoint.step for checkpoint in there if checkpoint.base is not None)
    for checkpoint in there:
        if checkpoint.step > last_delta:
            shutil.rmtree(checkpoint.path)
    before = checkpoint_of(tmp_path / "run")
    assert checkpoint_step(tmp_path / "run") == last_delta > 5
    logits = on_ranks(1, begun, settings, days.folders[1], tmp_path / "run", tmp_path / "checkpoints")
    check_all_goes_on(days, before, final_path(tmp_path / "checkpoints", 0), initial(settings, days.folders[1], day=1))
    assert logits == on_ranks(1, predicted, settings, days.folders[0], before)
