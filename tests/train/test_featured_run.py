"""A run on a data set with text ids and features beside the shards: trained, evaluated, scored, also with other ids."""

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from embeddings.distributed.process_group import process_group
from pipeline.evaluate.open_run import evaluate_run
from pipeline.evaluate.score import score_run
from pipeline.runs.run_folder import RunFolder
from pipeline.stream.data_set import DataSet
from schemas.shards import Split
from tests.featured import Log, write_featured
from tests.runs import Run, run_dare, small_settings

CPU = torch.device("cpu")
LOG = Log.random(60, seed=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("featured") / "data"
    write_featured(folder, LOG, seed=1)
    return folder


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    return Run(2, small_settings("epochs=1"), data, data.parent / "run").finish().folder


@pytest.fixture(autouse=True)
def alone() -> Any:
    with process_group(CPU):
        yield


def scored(run: Path, data: Path | None, out: Path) -> list[dict[str, Any]]:
    score_run(run, "test", "best", data, out, CPU, overwrite=False)
    lines: list[dict[str, Any]] = pq.read_table(out).to_pylist()
    return lines


def test_scores_have_the_raw_ids_and_are_the_same_with_other_ids(
    run: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = scored(run, None, tmp_path / "out")
    expected = [
        (user["id"], target["item"], target["timestamp"], target["label"], target["line"])
        for user in LOG.users
        for target in user["targets"]
        if target["split"] == Split.TEST
    ]
    names = ("user_id", "item_id", "timestamp", "label", "line")
    assert [tuple(line[name] for name in names) for line in lines] == expected
    write_featured(tmp_path / "other", LOG, seed=2)
    with caplog.at_level(logging.INFO, "dare"):
        assert scored(run, tmp_path / "other", tmp_path / "translated") == lines
    # Rare items have no row in the run's table.
    rare = len(LOG.rare)
    assert f"unknown there: {rare} of {len(LOG.items)} items, 0 of 4 categories" in caplog.text
    one, other = (evaluate_run(run, "test", "best", folder, CPU) for folder in (data, tmp_path / "other"))
    assert one == other


def test_the_command_line(run: Path, tmp_path: Path) -> None:
    code, output, errors = run_dare(tmp_path, "evaluate", "--run", run, "--json")
    assert (code, errors) == (0, "")
    tested = json.loads((run / "test.json").read_text())
    said = json.loads(output.splitlines()[-1])
    assert said["auc"] == pytest.approx(tested["auc"])
    assert "unknown" not in said
    write_featured(tmp_path / "other", LOG, seed=2)
    code, output, errors = run_dare(tmp_path, "evaluate", "--run", run, "--data", tmp_path / "other", "--json")
    assert code == 0
    assert "ids are translated to those of" in errors
    translated = json.loads(output.splitlines()[-1])
    assert translated.pop("unknown") == {
        "item": {"ids": len(LOG.items), "unknown": len(LOG.rare)},
        "category": {"ids": 4, "unknown": 0},
    }
    assert translated == said


def test_dictionaries_matter_where_the_model_has_the_feature(data: Path, tmp_path: Path) -> None:
    said = DataSet.open(data).dictionaries()
    other = json.loads(json.dumps(said))
    other["features"]["action"]["dictionary"] = "another"
    other["features"]["mass"]["mean"] = 7.0
    for features, alike in (("item,category,tags", True), ("item,action", False), ("item,mass", False)):
        run = RunFolder(tmp_path / features)
        run.path.mkdir()
        settings = "epochs: 1\nmodel:\n  features: [" + features + "]\n"
        run.begin({"settings.yaml": settings}, data, "one", said)
        assert run.has_dictionaries(data, "one", other)
        assert run.has_dictionaries(data, "another", said)
        assert run.has_dictionaries(data, "another", other) == alike
        assert not run.has_dictionaries(data, "another", other | {"item_rows": 1})
        # What an earlier version said of its data sets is not compared: raw ids are.
        former = {"items": said["items"], "categories": None, "behaviors": None, "scenes": None}
        assert not run.has_dictionaries(data, "another", former)
