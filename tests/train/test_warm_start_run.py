"""`dare train --from`: the command on a real chain of days; what it refuses; what new rows begin with."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.cli import bench_warm_start
from benchmarks.warm_start import WarmStartFigures
from embeddings.distributed.process_group import process_group
from embeddings.initialization import initialize
from embeddings.sharding import sharded_model
from pipeline.runs.checkpoint import checkpoints_in, last_checkpoint
from pipeline.runs.comparison import compare
from pipeline.runs.listing import run_state
from pipeline.runs.run_folder import RunFolder
from pipeline.stream.data_set import DataSet
from pipeline.train.run import train
from schemas.errors import UserError
from schemas.row_layout import LEAST_ROWS, RowLayout
from schemas.train import TrainSettings
from tests.featured_days import Days, write_days
from tests.runs import run_dare, small_settings
from tests.train.test_warm_start import CPU, SMALL, begun, checkpoint_of, initial, on_ranks, trained, values_of

FEW = ("epochs=1", "model.features=[item,category,tags,position]", "stream.batch_size=12", "checkpoint.every=4")


def settings_with(*more: str) -> TrainSettings:
    return small_settings(*FEW, *more)


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Days:
    return write_days(tmp_path_factory.mktemp("days"), SMALL)


@pytest.fixture(scope="module")
def run(days: Days, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    on_ranks(1, trained, settings_with(), days.folders[0], folder)
    return folder


def optimizer_steps(run: Path) -> tuple[int, set[int]]:
    """Steps of the last checkpoint, and those that Adam has counted."""
    found = last_checkpoint(run / "checkpoints")
    assert found is not None
    values = values_of(found.path)
    return found.step, {int(value) for key, value in values.items() if key.endswith(".step")}


def test_steps_begin_anew_and_the_optimizers_go_on(days: Days, run: Path, tmp_path: Path) -> None:
    before, counted = optimizer_steps(run)
    assert counted == {before}
    falling = ("dense.schedule=linear", "tables.schedule=linear", "dense.learning_rate=0.02")
    on_ranks(1, trained, settings_with(*falling), days.folders[1], tmp_path / "run", run)
    steps, counted = optimizer_steps(tmp_path / "run")
    assert steps == before, "the days have as many targets"
    assert counted == {before + steps}
    # It goes on without the run that it came from, and counts on.
    (tmp_path / "gone").mkdir()
    on_ranks(1, trained, settings_with(*falling, "epochs=2"), days.folders[1], tmp_path / "run")
    again, counted = optimizer_steps(tmp_path / "run")
    assert (again, counted) == (2 * steps, {before + 2 * steps})
    source = RunFolder(tmp_path / "run").source()
    assert source is not None
    assert source["run"] == str(run)
    assert source["step"] == before
    assert source["fingerprint"] == DataSet.open(days.folders[0]).fingerprint
    assert run_state(tmp_path / "run").source == str(run)
    assert [row["source"] for row in compare([run, tmp_path / "run"])] == [None, str(run)]


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_on_it_again(
    days: Days, run: Path, tmp_path: Path
) -> None:
    on_ranks(1, trained, settings_with(), days.folders[1], tmp_path / "one", run)
    on_ranks(1, trained, settings_with(), days.folders[1], tmp_path / "other", run)
    folder = RunFolder(tmp_path / "other")
    # As it is left by one that was killed: begun, and nothing saved.
    for checkpoint in checkpoints_in(folder.checkpoints):
        for file in checkpoint.path.iterdir():
            file.unlink()
        checkpoint.path.rmdir()
    folder.test_file.unlink()
    on_ranks(1, trained, settings_with(), days.folders[1], tmp_path / "other")
    assert (tmp_path / "one" / "losses.jsonl").read_text() == (tmp_path / "other" / "losses.jsonl").read_text()


def refusal(settings: TrainSettings, data: Path, folder: Path, source: Path | None) -> str:
    with process_group(CPU), pytest.raises(UserError) as raised:
        train(settings, data, folder, CPU, source=source)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_refusals(days: Days, run: Path, tmp_path: Path) -> None:
    first, second = days.folders
    new = tmp_path / "new"
    told = refusal(settings_with("model.attention.dim=8", "model.hidden=[8]"), second, new, run)
    assert "model.attention.dim is 8, and 4 in that run, model.hidden is [8], and [16] in that run" in told
    assert "stream.history_length is 9, and 12 in that run" in refusal(
        settings_with("stream.history_length=9"), second, new, run
    )
    assert "model.representation.optimizer is 'sgd', and 'rowwise_adagrad' in that run" in refusal(
        settings_with("model.representation.optimizer=sgd"), second, new, run
    )
    assert not new.exists()
    other = write_days(tmp_path / "other", SMALL, seed=2)
    assert "does not continue" in refusal(settings_with(), other.folders[1], new, run)
    (tmp_path / "empty").mkdir()
    assert "not the folder of a run" in refusal(settings_with(), second, new, tmp_path / "empty")
    on_ranks(1, trained, settings_with(), second, tmp_path / "later", run)
    assert "is an earlier day than that of" in refusal(settings_with(), first, new, tmp_path / "later")
    assert f"was begun from {run}, not from {tmp_path / 'later'}" in refusal(
        settings_with("epochs=2"), second, tmp_path / "later", tmp_path / "later" / ".." / "later"
    )
    assert "was begun with drawn weights, not from" in refusal(settings_with(), first, run, tmp_path / "later")
    assert "that is the run itself" in refusal(settings_with(), second, new, new)
    told = refusal(settings_with("new_rows=category_mean", "init={item_attention: x}"), second, new, run)
    assert "leave one of the two out" in told
    for checkpoint in checkpoints_in(tmp_path / "later" / "checkpoints"):
        (checkpoint.path / "checkpoint.json").write_text("{")
    assert "no checkpoint is whole" in refusal(settings_with(), second, new, tmp_path / "later")


def test_settings_that_may_change(days: Days, run: Path, tmp_path: Path) -> None:
    changed = ("model.attention.learning_rate=0.01", "model.retrieved.history=6", "seed=7", "dense.weight_decay=0.1")
    on_ranks(1, trained, settings_with(*changed, "model.search=local"), days.folders[1], tmp_path / "run", run)
    assert RunFolder(tmp_path / "run").test()["steps"]


def test_new_rows_are_those_of_no_former_day(days: Days) -> None:
    with process_group(CPU):
        model = sharded_model(settings_with(), DataSet.open(days.folders[1]).manifest, CPU)
        drawn = []
        for day in (0, 1, 2):
            initialize(model, 1, day)
            (table,) = (value for key, value in model.state_dict().items() if "item_attention" in key)
            drawn.append(table.local_shards()[0].tensor.clone())
    values = torch.cat(drawn).flatten()
    assert len(values.unique()) == len(values)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_mean_of_the_category(days: Days, run: Path, tmp_path: Path, ranks: int) -> None:
    settings = settings_with("new_rows=category_mean")
    on_ranks(ranks, begun, settings, days.folders[1], run, tmp_path / "checkpoints")
    found = last_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    old, new = values_of(checkpoint_of(run)), values_of(found.path)
    drawn = initial(settings, days.folders[1], day=1)
    first, second = days.encoders
    data_set = DataSet.open(days.folders[1])
    category_I = data_set.item_features({"category"}).columns_I["category"]
    of_category: dict[int, list[int]] = {}
    for name, (was, _) in days.kept.items():
        of_category.setdefault(int(category_I[second.item[name]]), []).append(was)
    means = 0
    for key, value in new.items():
        if ".item_" not in key or not key.startswith("model."):
            continue
        for name, place in days.new.items():
            category = int(category_I[second.item[name]])
            if category and category in of_category:
                means += 1
                expected = old[key][of_category[category]].double().mean(0)
                torch.testing.assert_close(value[place].double(), expected, rtol=1e-6, atol=1e-9)
            else:
                assert torch.equal(value[place], drawn[key][place])
        places = torch.tensor(list(days.kept.values()))
        assert torch.equal(value[places[:, 1]], old[key][places[:, 0]])
    assert means > 10
    assert first.largest_row < second.largest_row


def test_vectors_are_for_new_rows(days: Days, run: Path, tmp_path: Path) -> None:
    """By places; the rows of former items go on."""
    names = [*days.kept, *days.new]
    vectors = np.arange(4 * len(names), dtype=np.float32).reshape(-1, 4)
    table = pa.table({"raw_id": names, "vector": list(vectors)})
    pq.write_table(table, tmp_path / "vectors.parquet")
    settings = settings_with(f"init={{item_attention: {tmp_path / 'vectors.parquet'}}}")
    on_ranks(2, begun, settings, days.folders[1], run, tmp_path / "checkpoints")
    found = last_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    key = "model.tables.inherent.attention.embedding_bags.item_attention.weight"
    old, new = values_of(checkpoint_of(run))[key], values_of(found.path)[key]
    for number, name in enumerate(names):
        expected = old[days.kept[name][0]] if name in days.kept else torch.from_numpy(vectors[number])
        assert torch.equal(new[days.encoders[1].place(name)], expected), name


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(LEAST_ROWS, 10**6), more=st.integers(1, 3 * 10**5), ranks=st.sampled_from([2, 3, 8]))
def test_ranks_have_about_equal_parts_of_old_and_new_rows(rows: int, more: int, ranks: int) -> None:
    layout = RowLayout.of(rows + more)
    block = -(-layout.places // ranks)
    for row_N in (np.arange(1, rows + 1), np.arange(rows + 1, rows + more + 1)):
        held = np.bincount(layout.place(row_N) // block, minlength=ranks)
        # A few percent, beside the rows of the last round, which are of some stripes alone.
        assert held.max() - held.min() <= 0.03 * len(row_N) / ranks + 1024 // ranks + 2


def write_log(path: Path, day: int, users: int, items: range) -> Path:
    rng = np.random.default_rng(day)
    lines = ["user_id,item_id,category_id,timestamp"]
    for user in range(users):
        for number in range(12):
            item = int(rng.choice(items))
            lines.append(f"{user},{item},{item % 5},{100_000 * day + 100 * number + user % 7}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_command_on_a_chain_that_prepare_made(tmp_path: Path) -> None:
    def dare(*arguments: object) -> tuple[str, str]:
        code, told, errors = run_dare(tmp_path, *arguments)
        assert code == 0, errors
        return told, errors

    split = ["split.kind=paper", "split.min_behaviors=3", "split.train_stride=2", "split.train_targets=3"]
    first = write_log(tmp_path / "0.csv", 0, 40, range(60))
    dare(
        *("prepare", "--events", first, "--out", tmp_path / "d0"),
        *("history.keep=50", "split.negatives=1", *split),
    )
    second = write_log(tmp_path / "1.csv", 1, 50, range(20, 120))
    dare("prepare", "--extend", tmp_path / "d0", "--events", second, "--out", tmp_path / "d1")
    small = [*FEW[:1], "model.features=[item,category,position]", "stream.batch_size=24", "model.hidden=[8]"]
    small += ["model.attention.dim=4", "model.representation.dim=4", "model.retrieved.history=4"]
    dare("train", "--data", tmp_path / "d0", "--run", tmp_path / "r0", *small)
    told, errors = dare("train", "--data", tmp_path / "d1", "--run", tmp_path / "r1", "--from", tmp_path / "r0", *small)
    assert "begins on step" in errors
    assert "AUC not defined" in told, "the day has no targets for a test"
    chain = DataSet.open(tmp_path / "d1").manifest.chain
    assert chain is not None
    assert chain.new_items > 20
    assert f"{chain.new_items} begin anew" in errors
    told, _ = dare("evaluate", "--run", tmp_path / "r1", "--split", "train", "--json")
    assert json.loads(told.splitlines()[-1])["samples"] == DataSet.open(tmp_path / "d1").manifest.counts.train.targets
    # The model of the day before, on this day: its ids are translated without raw ids.
    told, errors = dare("evaluate", "--run", tmp_path / "r0", "--data", tmp_path / "d1", "--split", "train", "--json")
    assert f"{chain.new_items} of " in errors
    told, _ = dare("score", "--run", tmp_path / "r1", "--split", "train", "--out", tmp_path / "scores")
    scored = pq.read_table(tmp_path / "scores").to_pandas()
    positives = scored[scored["label"] == 1]
    assert len(positives)
    # Its own targets are of its own items; negatives are of any.
    assert set(positives["item_id"]) <= set(range(20, 120))
    assert set(scored["item_id"]) <= set(range(120))
    assert (tmp_path / "r1" / "source.json").is_file()


@pytest.mark.slow
def test_bench_ends_with_json(capfd: pytest.CaptureFixture[str]) -> None:
    bench_warm_start(ranks=2, rows=70_000, grown_rows=90_000, dim=4, json=True)
    figures = WarmStartFigures(**json.loads(capfd.readouterr().out.splitlines()[-1]))
    assert (figures.rows, figures.grown_rows) == (70_000, 90_000)
    assert figures.peak_bytes >= figures.resident_bytes > figures.state_bytes
