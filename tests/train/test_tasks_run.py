"""A run of several tasks: metrics, curves and scores of each, the task that chooses the best, and an exact resume."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.runs.checkpoint import best_checkpoint
from pipeline.runs.run_folder import read_step_log
from schemas.shards import Split
from tests.datasets import random_users, write_dataset
from tests.featured import Log, write_featured
from tests.runs import Run, pause, run_dare, small_settings

LOG = Log.random(150, seed=3)
TASKS = (
    "model.tasks=[click, {name: buy, after: click, weight: 0.5}]",
    "model.mixture={experts: 2, hidden: [12]}",
    "validation.task=buy",
    "validation.every=4",
    "log_every=2",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks") / "data"
    write_featured(folder, LOG, seed=1)
    return folder


@pytest.fixture(scope="module")
def run(data: Path) -> Run:
    return Run(2, small_settings(*TASKS), data, data.parent / "run").finish()


def test_each_task_has_metrics_over_the_targets_that_have_its_label(run: Run, tmp_path: Path) -> None:
    code, output, errors = run_dare(tmp_path, "evaluate", "--run", run.folder, "--json")
    assert (code, errors) == (0, "")
    found = json.loads(output.splitlines()[-1])
    code, _, errors = run_dare(tmp_path, "score", "--run", run.folder, "--out", tmp_path / "scores")
    assert (code, errors) == (0, "")
    scores = pq.read_table(tmp_path / "scores").to_pandas()
    assert [name for name in scores.columns if name.startswith(("label", "score", "logit"))] == [
        *("label", "label_buy", "score", "logit", "score_buy", "logit_buy")
    ]
    expected = [
        (user["id"], target["timestamp"], target["label"], target["label_buy"])
        for user in LOG.users
        for target in user["targets"]
        if target["split"] == Split.TEST
    ]
    assert (
        list(zip(scores.user_id, scores.timestamp, scores.label, scores.label_buy.fillna(-1), strict=True)) == expected
    )
    # One cannot happen without the other.
    assert (scores.score_buy < scores.score).all()
    assert list(found["tasks"]) == ["click", "buy"]
    for task, ending in (("click", ""), ("buy", "_buy")):
        labeled = scores[scores[f"label{ending}"].notna()]
        label, score = labeled[f"label{ending}"].astype(int), labeled[f"score{ending}"]
        metrics = found["tasks"][task]
        assert metrics["samples"] == len(labeled)
        assert metrics["positives"] == label.sum()
        assert metrics["users"] == labeled.user_id.nunique()
        # Weights of targets, of which some are 0, change no metric.
        assert metrics["auc"] == pytest.approx(roc_auc_score(label, labeled[f"logit{ending}"]), abs=1e-12)
        assert metrics["log_loss"] == pytest.approx(log_loss(label, score), abs=1e-9)
        assert metrics["calibration"] == pytest.approx(score.mean() / label.mean())
    assert found["tasks"]["buy"]["samples"] < found["tasks"]["click"]["samples"] == len(expected)
    assert {key: value for key, value in found.items() if key != "tasks"} == found["tasks"]["click"]
    tested = json.loads((run.folder / "test.json").read_text())
    for task, metrics in found["tasks"].items():
        # Of two ranks, not of one: two targets that are nearly alike may change places.
        assert tested["tasks"][task] == pytest.approx(metrics, abs=1e-3)


def test_the_best_checkpoint_and_the_curves(run: Run) -> None:
    validations = read_step_log(run.folder / "validations.jsonl")
    best = max(validations, key=lambda line: line["tasks"]["buy"]["auc"])
    assert best["step"] != max(validations, key=lambda line: line["auc"])["step"], "they agree: choose another seed"
    checkpoint = best_checkpoint(run.folder / "checkpoints")
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.score) == (best["step"], best["tasks"]["buy"]["auc"])
    curves = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    for tag, values in (("validation/auc", "click"), ("validation/buy/auc", "buy")):
        expected = [pytest.approx(line["tasks"][values]["auc"], abs=1e-6) for line in validations]
        assert [point.value for point in curves.Scalars(tag)] == expected
    total, click, buy = (curves.Scalars(f"loss/{name}") for name in ("train", "click", "buy"))
    assert len(total) == len(click) == len(buy) > 3
    for of_all, of_click, of_buy in zip(total, click, buy, strict=True):
        assert of_all.value == pytest.approx(of_click.value + 0.5 * of_buy.value, abs=1e-5)
    assert "validation/buy/precision_recall" in curves.Tags()["tensors"]


def test_a_killed_run_goes_on_exactly(run: Run, data: Path, tmp_path: Path) -> None:
    first = Run(2, small_settings(*TASKS), data, tmp_path / "run", pause, (6, tmp_path))
    first.wait_for_pause(tmp_path)
    first.kill()
    last = Run(2, small_settings(*TASKS), data, tmp_path / "run").finish()
    assert "goes on after step 4" in last.said()
    assert last.logs() == run.logs()
    assert (last.folder / "test.json").read_text() == (run.folder / "test.json").read_text()


def test_other_data_may_lack_a_label_and_labels_must_be_there_to_learn_from(
    run: Run, data: Path, tmp_path: Path
) -> None:
    refused = Run(1, small_settings("model.tasks=[click, fav]"), data, tmp_path / "refused")
    assert refused.wait() == [1]
    assert f"model.tasks: {data} has no label fav; its labels: click, buy" in refused.complaint()
    # The same data, but for what the labels are called: what is missing is not defined, and what is there is the same.
    for other, names in ((tmp_path / "click", ("click", "fav")), (tmp_path / "none", ("like", "fav"))):
        write_featured(other, LOG, seed=1, labels=names)
    code, output, errors = run_dare(tmp_path, "evaluate", "--run", run.folder, "--data", tmp_path / "click", "--json")
    assert code == 0
    assert "no label buy, which the model predicts; its labels are click, fav" in errors
    found = json.loads(output.splitlines()[-1])
    tested = json.loads((run.folder / "test.json").read_text())
    assert found["tasks"]["click"] == pytest.approx(tested["tasks"]["click"], abs=1e-3)
    assert (found["tasks"]["buy"]["samples"], found["tasks"]["buy"]["auc"]) == (0, None)
    code, _, errors = run_dare(tmp_path, "evaluate", "--run", run.folder, "--data", tmp_path / "none")
    assert code == 1
    assert "no label click, buy, which the model predicts; its labels are like, fav: prepare it with" in errors
    code, _, errors = run_dare(
        tmp_path, "score", "--run", run.folder, "--data", tmp_path / "none", "--out", tmp_path / "scores"
    )
    assert (code, errors) == (0, "")
    assert pq.read_table(tmp_path / "scores")["label"].null_count > 0
    with pytest.raises(ValueError, match=r"validation\.task: fav is none of model\.tasks; there are click, buy"):
        small_settings("model.tasks=[click, buy]", "validation.task=fav")
    with pytest.raises(ValueError, match=r"there are none: name them, or leave validation\.task out"):
        small_settings("validation.task=click")


def test_one_task_has_the_documents_of_before(tmp_path: Path) -> None:
    settings: dict[str, Any] = {}
    write_dataset(tmp_path / "data", random_users(60))
    for name, tasks in (("plain", ()), ("named", ("model.tasks=[label]",))):
        settings[name] = Run(1, small_settings("epochs=1", *tasks), tmp_path / "data", tmp_path / name).finish()
    assert settings["plain"].logs() == settings["named"].logs()
    documents = [(tmp_path / name / "test.json").read_text() for name in ("plain", "named")]
    assert documents[0] == documents[1]
    assert "tasks" not in json.loads(documents[0])
