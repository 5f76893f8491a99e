"""`dare experiment` with real runs: killed, gone on, refused, failed; and what it refuses before anything runs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from embeddings.models import MODELS
from jobs.experiment import SHIPPED, load_experiment
from pipeline.experiment.cells import cells_of
from pipeline.experiment.child import DIE_WITH_PARENT, Child
from schemas.experiment import AccuracyFloor
from schemas.settings import load_settings
from tests.datasets import random_users, write_dataset
from tests.launcher import PATIENCE_S
from tests.runs import run_dare

SETTINGS: dict[str, Any] = {
    "epochs": 3,
    "stream": {"batch_size": 16, "history_length": 12, "shuffle_memory": 20000},
    "model": {"retrieved": {"history": 4}, "hidden": [16]},
    "validation": {"every": 30},
    "checkpoint": {"every": 5},
    "log_every": 5,
}
BROKEN = {"dense": {"learning_rate": 1e30}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment") / "data"
    write_dataset(folder, random_users(400, seed=3))
    return folder


def write_experiment(folder: Path, data: Path, /, **changes: Any) -> Path:
    content = {
        "name": "tiny",
        "data": {"toy": {"folder": str(data)}},
        "models": {
            "DARE": {"model": "dare", "paper": {"toy": {4: 0.92568}}},
            "TWIN (broken)": {"model": "twin", "settings": BROKEN},
            # Longer than DARE, so that there is a time when DARE has finished and this one has not.
            "TWIN": {"model": "twin", "settings": {"epochs": 12, "checkpoint": {"every": 20}}},
        },
        "dims": [4],
        "seeds": [7],
        "settings": SETTINGS,
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return file


def start(file: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "jobs.cli", "experiment", str(file), "--out", str(out), "--parallel", "2"]
    with out.with_name("runner.log").open("ab") as log:
        return subprocess.Popen([*command, *options], stdout=log, stderr=log)


def trainers(out: Path) -> list[int]:
    """Processes that train in the experiment's folder."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        command = process.info["cmdline"] or []
        if "train" in command and any(str(out) in part for part in command) and process.info["status"] != "zombie":
            found.append(process.info["pid"])
    return found


def wait_until(
    condition: Callable[[], object], runner: subprocess.Popen[bytes], out: Path, timeout: float = PATIENCE_S
) -> None:
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, out.with_name("runner.log").read_text()
        assert runner.poll() is None, out.with_name("runner.log").read_text()
        time.sleep(0.01)


def table(out: Path) -> dict[str, dict[str, Any]]:
    return {row["label"]: row for row in pq.read_table(out / "results.parquet").to_pylist()}


@pytest.mark.slow
def test_a_killed_runner_leaves_no_trainers_and_the_next_one_goes_on(data: Path, tmp_path: Path) -> None:
    file, out = write_experiment(tmp_path, data), tmp_path / "out"
    runner = start(file, out)
    try:
        wait_until((out / "experiment.yaml").is_file, runner, out)
        refused(tmp_path, file, out, "another process is running the experiment")
        # Two cells run at a time, and the broken one is the second to start: it has failed when TWIN is in its middle.
        in_the_middle = out / "runs/toy/twin/d4/s7/checkpoints"
        wait_until(lambda: [*in_the_middle.glob("step-*")], runner, out)
        wait_until(lambda: table(out)["DARE"]["state"] == "finished", runner, out)
        assert trainers(out)
    finally:
        runner.kill()
        runner.wait()
    until = time.monotonic() + 30
    while trainers(out):
        assert time.monotonic() < until, "trainers outlive their runner"
        time.sleep(0.05)

    before = table(out)
    assert {label: row["state"] for label, row in before.items()} == {
        "DARE": "finished",
        "TWIN (broken)": "failed",
        "TWIN": "unfinished",
    }
    first = out / before["DARE"]["run"]

    def written() -> dict[Path, int]:
        trained = [path for path in sorted(first.rglob("*")) if path.is_file() and path.name != "bootstrap.npz"]
        return {path: path.stat().st_mtime_ns for path in trained}

    untouched = written()

    # As if the runner had been killed before it removed what is not the best.
    (best,) = (first / "checkpoints").iterdir()
    shutil.copytree(best, best.with_name("step-999999999999"))
    log = out.with_name("runner.log")
    said = log.stat().st_size
    assert start(file, out, "--json").wait(PATIENCE_S) == 1  # because of the broken cell
    output = log.read_bytes()[said:].decode()
    assert re.search(r"^dare: 1 of 3 cells failed, the first in \S+: step \d+: loss or gradients", output, re.MULTILINE)
    assert untouched == written()
    starts = json.loads((out / "runs/toy/twin/d4/s7/job.json").read_text())["starts"]
    assert len(starts) == 2
    assert starts[1]["step"] > 0, "the killed cell began anew"

    rows = table(out)
    assert len(rows) == 3
    for label, row in rows.items():
        if label == "TWIN (broken)":
            assert row["state"] == "failed"
            assert "not finite" in row["error"]
            assert row["auc"] is None
        else:
            test = json.loads((out / row["run"] / "test.json").read_text())
            assert row["state"] == "finished"
            assert (row["auc"], row["gauc"], row["log_loss"]) == (test["auc"], test["gauc"], test["log_loss"])
            assert row["model"] == label.lower()
            assert len([*(out / row["run"] / "checkpoints").iterdir()]) == 1
            settings = yaml.safe_load((out / row["run"] / "settings.yaml").read_text())
            assert settings["seed"] == row["seed"] == 7
            assert settings["model"]["attention"]["dim"] == settings["model"]["representation"]["dim"] == 4
            assert row["samples_per_s"] > 0
            assert row["peak_bytes"] > 1 << 28
    assert rows["DARE"]["table_parameters"] == 2 * rows["TWIN"]["table_parameters"]

    document = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert len(document["cells"]) == 3
    (pair,) = document["pairs"]
    assert {pair["first"], pair["second"]} == {"DARE", "TWIN"}
    assert pair["of"]["difference"] == pytest.approx(rows[pair["first"]]["auc"] - rows[pair["second"]]["auc"])
    assert pair["of"]["difference"] >= 0
    assert pair["of"]["low"] <= pair["of"]["difference"] <= pair["of"]["high"]
    markdown, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    for text in (markdown, page):
        assert ".92568" in text
        assert "TWIN (broken)" in text
        assert "not finite" in text
    assert page.count("<svg") == 3
    assert not re.search(r"(src|href)=.https?:", page)

    written = (out / "experiment.yaml").read_text()
    refused(tmp_path, write_experiment(tmp_path, data, settings=SETTINGS | {"epochs": 4}), out, "epochs is 4, was 3")
    assert (out / "experiment.yaml").read_text() == written, "the settings of what was not run"
    cell = out / "runs/toy/dare/d4/s7"
    tested, losses = (cell / "test.json").read_text(), (cell / "losses.jsonl").read_text()
    code, _, errors = run_dare(tmp_path, "train", "--data", data, "--run", cell, "--config", cell.with_suffix(".yaml"))
    assert code == 0
    assert "finished already" in errors
    assert ((cell / "test.json").read_text(), (cell / "losses.jsonl").read_text()) == (tested, losses)


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        ("print('dare: step 3: it broke'); print('at the end'); sys.exit(1)", "step 3: it broke"),
        ("print('Trace'); print('KeyError: 3'); print(f'dare: {errors.FAULT_LINE}'); sys.exit(70)", "KeyError: 3"),
        ("print('so far'); os.kill(os.getpid(), 9)", "ended by SIGKILL; last line: so far"),
        ("sys.exit(3)", "it said nothing"),
    ],
)
def test_why_a_child_failed_is_one_line(program: str, complaint: str, tmp_path: Path) -> None:
    program = f"import os, sys; sys.stdout.reconfigure(line_buffering=True); from pipeline import errors; {program}"
    child = Child([sys.executable, "-c", program], {}, tmp_path / "log")
    assert child.wait(PATIENCE_S)
    assert child.complaint() == complaint


def test_a_child_whose_parent_is_gone_before_it_asks_does_not_begin() -> None:
    nobody = str(os.getppid())  # not the parent of what is started here
    command = [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, nobody, "echo", "begun"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout) == (1, "")
    command[5] = str(os.getpid())
    assert subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S).stdout == "begun\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_runner_that_is_asked_to_stop_lets_cells_save(data: Path, tmp_path: Path, number: signal.Signals) -> None:
    long = SETTINGS | {"epochs": 200, "checkpoint": {"every": 100_000}, "validation": {"every": 100_000}}
    models = {"DARE": {"model": "dare"}, "TWIN": {"model": "twin"}, "another DARE": {"model": "dare"}}
    file, out = write_experiment(tmp_path, data, models=models, settings=long), tmp_path / "out"
    runner = start(file, out)
    losses = out / "runs/toy/dare/d4/s7/losses.jsonl"
    wait_until(lambda: losses.exists() and losses.stat().st_size > 1000, runner, out)
    runner.send_signal(number)
    assert runner.wait(PATIENCE_S) == 1
    assert "stopped, 0 of 3 cells are finished" in out.with_name("runner.log").read_text()
    assert not trainers(out)
    assert [*losses.parent.glob("checkpoints/step-*")]


def refused(folder: Path, file: Path, out: Path, message: str, *options: object) -> None:
    code, _, errors = run_dare(folder, "experiment", file, "--out", out, *options)
    assert code == 1
    (line,) = errors.splitlines()
    assert line.startswith("dare: ")
    assert message in line


@pytest.mark.slow
def test_what_cannot_run_is_refused_before_anything_does(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def case(message: str, *options: object, **changes: Any) -> None:
        refused(tmp_path, write_experiment(tmp_path, data, **changes), out, message, *options)
        assert not [*out.glob("runs")]

    known = ", ".join(sorted(MODELS))
    case(f"A: model must be one of {known} (not 'dire')", models={"A": {"model": "dire"}})
    case(
        "models.A, d 4: model.retrived: unknown key",
        models={"A": {"model": "dare", "settings": {"model": {"retrived": 3}}}},
    )
    case("as folders, must not repeat 'a-b'", models={"A (b)": {"model": "dare"}, "a b": {"model": "twin"}})
    case("dims must not repeat 4", dims=[4, 4])
    case("toy, A, d 4, seed 7: model.features: scene is not in this data set", models={"A": SCENE})
    case("toy, A, d 4, seed 7: model.features: scene is not in this data set", models={"A": SCENE}, name="renamed")
    adam = {"model": "dare", "settings": {"model": {"attention": {"optimizer": "adam"}}}}
    case("A, d 4, seed 7: table item_attention: optimizer adam needs CUDA", models={"A": adam})
    case("the experiment has no such data set; it has toy", "--data", f"other={data}")
    case("is written NAME=FOLDER", "--data", str(data))
    case("manifest.json", "--data", f"toy={tmp_path}")
    case("dare prepare --preset taobao --events FILE", data={"taobao": {"preset": "taobao"}})
    case("must be one of completejourney, generic, movielens, taobao, tmall (not 'x')", data={"x": {"preset": "x"}})
    case("give one of folder, preset and synth (not none)", data={"x": {}})
    case("recipe", recipe="none.yaml")
    case("tiny.json", "--check", tmp_path / "tiny.json")
    refused(tmp_path, tmp_path / "nothing.yaml", out, "not a shipped experiment; those are")
    refused(tmp_path, write_experiment(tmp_path, data), data, "not the folder of an experiment")


@pytest.mark.parametrize("value", [3, None, "eta", ["dare"]])
def test_a_section_that_is_no_mapping_is_refused(value: Any, data: Path, tmp_path: Path) -> None:
    def refusal(**changes: Any) -> str:
        settings, recipe = load_experiment(str(write_experiment(tmp_path, data, **changes)))
        with pytest.raises(ValueError) as error:
            cells_of(settings, recipe, tmp_path)
        return str(error.value)

    said = f"model: a mapping of settings is wanted, not {value!r}"
    assert refusal(settings={"model": value}) == f"settings.{said}"
    row = {"model": "dare", "settings": {"model": value}}
    assert refusal(models={"A": row}) == f"models.A: settings.{said}"
    attention = {"model": {"attention": value}}
    assert refusal(settings=attention) == f"settings.model.attention: a mapping of settings is wanted, not {value!r}"
    if value is not None:
        assert "settings.stream: a mapping" in refusal(settings={"stream": value})


def test_files_that_extend_files(data: Path, tmp_path: Path) -> None:
    rows = {"A": {"model": "dare"}, "B": {"model": "twin"}}
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/rows.yaml").write_text(yaml.safe_dump({"models": rows, "dims": [8]}))
    (tmp_path / "deep/sized.yaml").write_text(yaml.safe_dump({"extends": ["rows.yaml"], "seeds": [7], "dims": [16]}))
    file = tmp_path / "mine.yaml"
    source = {"toy": {"folder": str(data)}}
    own: dict[str, Any] = {"name": "mine", "extends": ["deep/sized.yaml", "deep/rows.yaml"], "data": source}
    file.write_text(yaml.safe_dump(own))
    settings, _ = load_experiment(str(file))
    assert (list(settings.models), settings.seeds, settings.dims) == (["A", "B"], (7,), (8,))
    file.write_text(yaml.safe_dump(own | {"extends": ["deep/sized.yaml"]}))
    assert load_experiment(str(file))[0].dims == (16,)

    def refusal() -> str:
        with pytest.raises(ValueError) as error:
            load_experiment(str(file))
        assert "\n" not in str(error.value)
        return str(error.value)

    (tmp_path / "deep/rows.yaml").write_text("extends: [../mine.yaml]")
    assert "mine.yaml extends itself, at once or by way of others" in refusal()
    (tmp_path / "deep/rows.yaml").write_text("extends: sized.yaml")
    assert "extends: a list of files is wanted, not 'sized.yaml', in " in refusal()
    (tmp_path / "deep/rows.yaml").write_text("models: [")
    assert "cannot be read: " in refusal()
    assert "rows.yaml" in refusal()
    (tmp_path / "deep/rows.yaml").unlink()
    assert "rows.yaml: no such settings file" in refusal()
    file.write_text("models: {A: [")
    assert refusal().startswith(f"{file}: cannot be read: ")


SCENE = {"model": "dare", "settings": {"model": {"features": ["item", "scene"]}}}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_experiments_describe_runs(name: str) -> None:
    settings, recipe = load_experiment(name)
    assert settings.name == name
    cells = cells_of(settings, recipe, Path("out"))
    assert len(cells) == len(settings.models) * len(settings.dims) * len(settings.seeds) * len(settings.data)
    assert {cell.settings.model.name for cell in cells} <= set(MODELS)
    assert len({cell.folder for cell in cells}) == len(cells)
    # A whole table with the first seed comes before the second.
    assert [cell.seed for cell in cells] == sorted([*settings.seeds] * (len(cells) // len(settings.seeds)))


def test_the_papers_settings_and_figures() -> None:
    settings, recipe = load_experiment("table1-tmall")
    cell = next(
        cell
        for cell in cells_of(settings, recipe, Path("out"))
        if (cell.label, cell.dim, cell.seed) == ("TWIN (w/ proj.)", 64, 5)
    )
    assert cell.folder == Path("out/runs/tmall/twin-w-proj/d64/s5")
    assert cell.settings.model.name == "twin-projection"
    assert cell.settings.model.attention.dim == 64
    assert cell.settings.stream.batch_size == 2048
    assert settings.models["TWIN (w/ proj.)"].paper["tmall"][64] == 0.95570


def test_the_floor_is_of_the_smoke_experiment() -> None:
    file = Path(__file__).parents[2] / "benchmarks/accuracy.json"
    floor = load_settings(AccuracyFloor, [file])
    smoke, _ = load_experiment("smoke")
    assert floor.experiment == "smoke"
    assert floor.floors.keys() == smoke.data.keys()
    for by_dim in floor.floors.values():
        assert set(by_dim) == set(smoke.dims)
        assert all(set(by_label) == set(smoke.models) for by_label in by_dim.values())
    assert {row.model for row in smoke.models.values()} == set(MODELS)


@pytest.mark.skipif(not os.path.exists("/proc"), reason="needs /proc")
def test_help_does_not_import_torch() -> None:
    code = "import sys, jobs.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
