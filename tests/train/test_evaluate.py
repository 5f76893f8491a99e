"""`dare evaluate`, `dare score` and `dare compare`: the same on any number of ranks, and what they refuse."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from embeddings.distributed.process_group import process_group
from jobs.cli import main
from pipeline.evaluate.open_run import evaluate_run
from pipeline.evaluate.score import score_run
from pipeline.ingest.prepare import prepare
from pipeline.runs.run_folder import RunFolder, read_step_log, settings_text
from pipeline.stream.data_set import DataSet
from schemas.documents import read_json
from schemas.prepare import PrepareSettings
from schemas.shards import Split
from tests.datasets import ITEMS, random_users, write_dataset
from tests.launcher import run_ranks
from tests.runs import SMALL, Run, run_dare, small_settings

CPU = torch.device("cpu")
USERS = random_users(120)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "data"
    write_dataset(folder, USERS)
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Run(1, small_settings(), data, tmp_path_factory.mktemp("runs") / "run").finish().folder


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with process_group(CPU):
        yield


def both(run: Path, split: str, which: str, out: Path) -> tuple[dict[str, Any], int]:
    samples = score_run(run, split, which, None, out, CPU, overwrite=False)
    return asdict(evaluate_run(run, split, which, None, CPU)["label"]), samples


def test_ranks_agree_with_each_other_and_with_scikit_learn(run: Path, tmp_path: Path) -> None:
    alone, samples = both(run, "test", "best", tmp_path / "1")
    saved = json.loads((run / "test.json").read_text())
    assert {name: saved[name] for name in alone} == alone
    outcomes = run_ranks(3, both, run, "test", "best", tmp_path / "3")
    for evaluation, count in outcomes:
        assert evaluation == pytest.approx(alone, rel=1e-6)
        assert count == samples
    assert len(list((tmp_path / "3").iterdir())) == 3
    assert not list(tmp_path.glob(".*"))
    one, three = (pq.read_table(tmp_path / name).to_pandas() for name in ("1", "3"))
    key = ["user_id", "item_id", "label", "score"]
    one, three = (table.sort_values(key).reset_index(drop=True) for table in (one, three))
    assert one[key[:3]].equals(three[key[:3]])
    assert one["score"].to_numpy() == pytest.approx(three["score"].to_numpy(), rel=1e-5)
    assert len(one) == samples == alone["samples"]
    assert roc_auc_score(one["label"], one["score"]) == pytest.approx(alone["auc"], abs=1e-6)
    assert log_loss(one["label"], one["score"].astype(float)) == pytest.approx(alone["log_loss"], rel=1e-5)
    expected = sorted(
        (user.user_id, target.item or math.inf, target.label)
        for user in USERS
        for target in user.targets
        if target.split == Split.TEST
    )
    found = one[["user_id", "item_id", "label"]].fillna(math.inf).to_numpy().tolist()
    assert sorted(map(tuple, found)) == expected
    assert one["item_id"].max() <= ITEMS


def test_last_and_best(run: Path) -> None:
    lines = read_step_log(run / "validations.jsonl")
    best = asdict(evaluate_run(run, "validation", "best", None, CPU)["label"])
    last = asdict(evaluate_run(run, "validation", "last", None, CPU)["label"])
    assert best == {name: value for name, value in max(lines, key=lambda line: line["auc"]).items() if name != "step"}
    assert last == {name: value for name, value in lines[-1].items() if name != "step"}


def test_refusals(run: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_dataset(other, random_users(20, behaviors=2), behaviors=("a", "b"))
    assert evaluate_run(run, "test", "best", other, CPU)["label"].samples > 0
    with pytest.raises(ValueError, match="not the folder of a run"):
        evaluate_run(data, "test", "best", None, CPU)
    with pytest.raises(ValueError, match="not a data set"):
        evaluate_run(run, "test", "best", tmp_path, CPU)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "settings.yaml").write_text((run / "settings.yaml").read_text())
    with pytest.raises(ValueError, match="no checkpoint yet"):
        evaluate_run(tmp_path / "empty", "test", "best", None, CPU)
    with pytest.raises(ValueError, match="is not empty"):
        score_run(run, "test", "best", None, other, CPU, overwrite=False)


def test_another_data_set_needs_the_dictionaries_of_the_run(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [(user, item, item % 5, time) for user in range(40) for time, item in enumerate(rng.integers(0, 60, 30))]
    lines = ["user_id,item_id,category_id,timestamp", *(",".join(map(str, row)) for row in rows)]
    (tmp_path / "events.csv").write_text("\n".join(lines) + "\n")

    def prepared(name: str, seed: int, test_groups: int = 3) -> Path:
        split = {"kind": "by_timestamp", "min_history": 5, "test_groups": test_groups, "validation_groups": 2}
        content = {"events": {"files": [str(tmp_path / "events.csv")]}, "split": split, "seed": seed}
        prepare(PrepareSettings.model_validate(content), tmp_path / name)
        return tmp_path / name

    data = prepared("data", 1)
    run = Run(1, small_settings("epochs=1"), data, tmp_path / "run").finish().folder
    assert evaluate_run(run, "test", "best", prepared("split", 1, 5), CPU)["label"].samples > 0
    # Other ids for the same items: they are translated.
    seed = prepared("seed", 2)
    assert evaluate_run(run, "test", "best", seed, CPU)["label"].samples > 0
    record = read_json(run / "data_set.json")
    del record["dictionaries"]
    (run / "data_set.json").write_text(json.dumps(record))
    assert evaluate_run(run, "test", "best", None, CPU)["label"].samples > 0
    with pytest.raises(ValueError, match="an older program wrote it"):
        evaluate_run(run, "test", "best", tmp_path / "split", CPU)
    # Where the run's data set has become another one, nothing says what its ids were.
    data.rename(tmp_path / "former")
    seed.rename(data)
    record |= {"dictionaries": DataSet.open(tmp_path / "former").dictionaries()}
    (run / "data_set.json").write_text(json.dumps(record))
    for other in (None, tmp_path / "data"):
        with pytest.raises(ValueError, match="which could tell what they were, has changed since") as refused:
            evaluate_run(run, "test", "best", other, CPU)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="has changed since"):
        score_run(run, "test", "best", None, tmp_path / "out", CPU, overwrite=False)
    assert not (tmp_path / "out").exists()
    assert evaluate_run(run, "test", "best", tmp_path / "former", CPU)["label"].samples > 0


def test_vocabularies_matter_where_the_model_has_the_feature(tmp_path: Path) -> None:
    names = tmp_path / "one", tmp_path / "other"
    for folder, behaviors in zip(names, (("a", "b"), ("b", "c")), strict=True):
        write_dataset(folder, random_users(20, behaviors=2), behaviors=behaviors)
    one, other = (DataSet.open(folder) for folder in names)
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    settings = small_settings("model.features=[item,behavior]")
    run.begin({"settings.yaml": settings_text(settings)}, one.folder, one.fingerprint, one.dictionaries())
    assert run.has_dictionaries(one.folder, "another", one.dictionaries())
    assert not run.has_dictionaries(other.folder, other.fingerprint, other.dictionaries())


def test_compare(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = ["model.name=twin", "model.attention.dim=8", "epochs=1"]
    other = Run(1, small_settings(*twin), data, tmp_path / "twin").finish().folder

    def compare(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["dare", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        return capsys.readouterr().out if exit.value.code in (0, None) else str(exit.value.code)

    output = compare(run, other, "--json")
    assert "twin" in output
    rows = json.loads(output.splitlines()[-1])["runs"]
    assert [row["model"] for row in rows] == ["dare", "twin"]
    assert rows[0]["settings"] == {"epochs": 2, "model.attention.dim": 4}
    assert rows[1]["settings"] == {"epochs": 1, "model.attention.dim": 8}
    assert rows[0]["auc"] == json.loads((run / "test.json").read_text())["auc"]
    (other / "test.json").unlink()
    assert "the run is not finished" in compare(run, other)
    assert "not the folder of a run" in compare(tmp_path)


def test_the_command_line(run: Path, data: Path, tmp_path: Path) -> None:
    code, output, errors = run_dare(tmp_path, "evaluate", "--run", run, "--json")
    assert (code, errors) == (0, "")
    tested = json.loads((run / "test.json").read_text())
    result = json.loads(output.splitlines()[-1])
    assert result == {name: tested[name] for name in result}
    assert {"auc", "gauc", "log_loss", "normalized_entropy", "calibration", "samples"} <= result.keys()
    code, output, errors = run_dare(tmp_path, "score", "--run", run, "--out", tmp_path / "out", "--split", "validation")
    assert (code, errors) == (0, "")
    assert f"{pq.read_table(tmp_path / 'out').num_rows} predictions" in output
    code, output, errors = run_dare(tmp_path, "train", "--run", run, "--data", data, *SMALL)
    assert code == 0
    assert errors.count("\n") == 1
    assert "finished already" in errors
    assert f"test of the best checkpoint, of step {tested['checkpoint_step']}: AUC {tested['auc']:.4f}, GAUC" in output
    code, output, errors = run_dare(tmp_path, "evaluate", "--run", data)
    assert (code, output) == (1, "")
    assert errors.startswith("dare: ")
    assert errors.count("\n") == 1


@pytest.mark.slow
def test_the_command_line_under_a_launcher(data: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]

    def dare(*arguments: object, launched: bool) -> subprocess.CompletedProcess[str]:
        command = [*(launcher if launched else [sys.executable, "-m"]), "jobs.cli", *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120, check=False
        )

    training = ["train", "--data", data, "--run", tmp_path / "run", *SMALL, "epochs=1"]
    trained = dare(*training, launched=True)
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr.count("begins, ") == 1
    assert "Warning" not in trained.stderr
    evaluated = dare("evaluate", "--run", tmp_path / "run", "--split", "test", "--json", launched=False)
    assert evaluated.returncode == 0, evaluated.stderr
    result = json.loads(evaluated.stdout.splitlines()[-1])
    tested = json.loads((tmp_path / "run" / "test.json").read_text())
    assert result == pytest.approx({name: tested[name] for name in result}, rel=1e-6)
    assert {"auc", "gauc", "log_loss", "normalized_entropy", "calibration", "samples"} <= result.keys()


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, jobs.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
