"""`dare score`: what it writes joins back to the log, whichever data set the impressions are prepared into."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score

from embeddings.distributed.process_group import process_group
from pipeline.evaluate.open_run import evaluate_run
from pipeline.evaluate.score import score_run
from pipeline.ingest.prepare import prepare
from schemas.errors import UserError
from schemas.manifest import Manifest
from schemas.prepare import PrepareSettings
from tests.launcher import run_ranks
from tests.runs import Run, run_dare, small_settings

CPU = torch.device("cpu")
ITEMS, USERS = 40, 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Events, and impressions in two files of one name, with a column of the caller's own."""
    folder = tmp_path_factory.mktemp("score")
    rng = np.random.default_rng(3)
    items = rng.integers(1, ITEMS + 1, (USERS, 40)).tolist()
    with (folder / "events.csv").open("w", newline="") as file:
        rows = [
            (100 + user, item, item % 5, 10 * time) for user in range(USERS) for time, item in enumerate(items[user])
        ]
        csv.writer(file).writerows([("user_id", "item_id", "category_id", "timestamp"), *rows])
    for day in (1, 2):
        (folder / f"day{day}").mkdir()
        with (folder / f"day{day}" / "shown.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("request", "user_id", "item_id", "category_id", "timestamp", "label"))
            for number in range(300):
                user, item = int(rng.integers(0, USERS)), int(rng.integers(1, ITEMS + 1))
                time = int(rng.integers(0, 400))
                writer.writerow((f"r{day}-{number}", 100 + user, item, item % 5, time, int(item % 3 == 0)))
                if number % 50 == 0:  # the same again
                    writer.writerow((f"again{day}-{number}", 100 + user, item, item % 5, time, int(item % 3 == 0)))
    return folder


def prepared(folder: Path, name: str, shown: list[Path] | None = None, **more: Any) -> Path:
    shown = shown or sorted(folder.glob("day*"))
    content = {
        "events": {"files": [str(folder / "events.csv")]},
        "impressions": {"files": [str(path) for path in shown], **more.pop("impressions", {})},
        "split": {"kind": "impressions", "min_history": 3},
        "shards": {"behaviors_per_shard": 300, "users_per_row_group": 4},
        **more,
    }
    prepare(PrepareSettings.model_validate(content), folder / name)
    return folder / name


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    data = prepared(folder, "data", history={"keep": 100})
    return Run(1, small_settings("epochs=1"), data, folder / "run").finish().folder


@pytest.fixture(autouse=True)
def alone() -> Any:
    with process_group(CPU):
        yield


def scored(run: Path, data: Path | None, out: Path, split: str = "test", **more: Any) -> pd.DataFrame:
    score_run(run, split, "best", data, out, CPU, overwrite=False, **more)
    parts = [pq.read_table(path).to_pandas() for path in sorted(out.glob("part-*.parquet"))]
    return pd.concat(parts).sort_values(["file", "line"]).reset_index(drop=True)


def log_of(folder: Path) -> pd.DataFrame:
    logs = []
    for day in (1, 2):
        log = pd.read_csv(folder / f"day{day}" / "shown.csv")
        logs.append(log.assign(file=f"day{day}/shown.csv", line=np.arange(1, len(log) + 1)))
    return pd.concat(logs)


def test_file_and_line_find_every_impression(folder: Path, run: Path, tmp_path: Path) -> None:
    test = scored(run, None, tmp_path / "out")
    joined = test.merge(log_of(folder), on=["file", "line"], suffixes=("", "_log"), validate="one_to_one")
    assert len(joined) == len(test) > 50
    for name in ("user_id", "item_id", "timestamp", "label"):
        assert (joined[name] == joined[f"{name}_log"]).all()
    assert test["score"].dtype == np.float64
    np.testing.assert_allclose(test["score"], 1 / (1 + np.exp(-test["logit"].astype(np.float64))), rtol=1e-12)
    evaluation = evaluate_run(run, "test", "best", None, CPU)["label"]
    assert roc_auc_score(test["label"], test["logit"]) == pytest.approx(evaluation.auc, abs=1e-12)
    assert roc_auc_score(test["label"], test["score"]) == pytest.approx(evaluation.auc, abs=1e-12)


def test_the_callers_lines_and_columns_are_kept(folder: Path, run: Path, tmp_path: Path) -> None:
    names = (str(folder / "day*"),)
    test = scored(run, None, tmp_path / "out", impressions=names)
    for index, day in enumerate((1, 2)):
        mine = pq.read_table(tmp_path / "out" / f"impressions-{index:05}.parquet").to_pandas()
        log = pd.read_csv(folder / f"day{day}" / "shown.csv", dtype=str)
        pd.testing.assert_frame_equal(mine[list(log.columns)].astype(object), log.astype(object))
        of_file = test[test["file"] == f"day{day}/shown.csv"]
        with_score = mine[mine["score"].notna()]
        assert list(with_score.index + 1) == of_file["line"].tolist()
        assert with_score["score"].tolist() == of_file["score"].tolist()
    with pytest.raises(UserError, match="give the same files"):
        scored(run, None, tmp_path / "other", impressions=(str(folder / "day1"),))
    assert not (tmp_path / "other").exists()
    changed = tmp_path / "changed"
    for day in (1, 2):
        (changed / f"day{day}").mkdir(parents=True)
        content = (folder / f"day{day}" / "shown.csv").read_bytes()
        (changed / f"day{day}" / "shown.csv").write_bytes(content.replace(b"r2-5,", b"r2-6,"))
    with pytest.raises(UserError, match=r"day2/shown.csv has changed since"):
        scored(run, None, tmp_path / "other", impressions=(str(changed / "day*"),))


def test_ids_of_another_data_set_are_translated(folder: Path, run: Path, tmp_path: Path) -> None:
    expected = scored(run, None, tmp_path / "expected")
    other = prepared(folder, "other", seed=9)
    assert (other / "items.parquet").read_bytes() != (folder / "data" / "items.parquet").read_bytes()
    pd.testing.assert_frame_equal(scored(run, other, tmp_path / "out"), expected)
    pd.testing.assert_frame_equal(
        pd.concat(
            [pq.read_table(path).to_pandas() for path in ranks_scored(run, other, tmp_path / "ranks")]
        ).sort_values(["file", "line"], ignore_index=True)[["file", "line", "item_id"]],
        expected[["file", "line", "item_id"]],
    )


def ranks_scored(run: Path, data: Path, out: Path) -> list[Path]:
    run_ranks(2, _score, run, data, out)
    return sorted(out.glob("part-*.parquet"))


def _score(run: Path, data: Path, out: Path) -> int:
    return score_run(run, "test", "best", data, out, CPU, overwrite=False)


def test_new_impressions_without_labels(folder: Path, run: Path, tmp_path: Path) -> None:
    """One item was never seen: its embedding is that of the unknown, its raw id is in the output all the same."""
    new = tmp_path / "new.parquet"
    items = [1, 2, 999_999, 3]
    columns = {"user_id": [100, 101, 100, 555], "item_id": items, "category_id": [1, 2, 3, 3], "timestamp": [500] * 4}
    pq.write_table(pa.table(columns), new)
    data = prepared(folder, "new", [new], impressions={"label": None})
    assert json.loads((data / "manifest.json").read_text())["counts"]["impressions_left_out"] == {"no_events": 1}
    table = scored(run, data, tmp_path / "out", impressions=(str(new),))
    assert table["item_id"].tolist() == items[:3]
    assert table["label"].isna().all()
    mine = pq.read_table(tmp_path / "out" / "impressions-00000.parquet").to_pandas()
    assert mine["score"].notna().tolist() == [True, True, True, False]
    assert table["score"].nunique() == 3
    # An unknown category of a known item, or the known one, is no matter of the new data set's numbers.
    code, _, errors = run_dare(folder, "evaluate", "--run", run, "--data", data)
    assert code == 1
    assert "have no labels" in errors
    code, told, _ = run_dare(folder, "stream", data, "--split", "test")
    assert code == 0
    assert ", without labels," in told
    code, _, errors = run_dare(folder, "train", "--data", data, "--run", tmp_path / "run2")
    assert code == 1
    assert "no targets to stream in split train" in errors


def test_tomorrow_is_scored_before_its_events_are_there(folder: Path, run: Path, tmp_path: Path) -> None:
    """The scores are those of the day that is prepared later, whose events come after its impressions."""
    shown = pd.DataFrame(
        {"user_id": [100, 101, 101, 555, 102], "item_id": [1, 2, 999_999, 3, 4], "category_id": [1, 2, 3, 3, 4]}
    ).assign(timestamp=[500, 501, 502, 503, 504])
    shown.to_csv(tmp_path / "tomorrow.csv", index=False)
    shown.assign(label=[0, 1, 0, 1, 1]).to_csv(tmp_path / "shown.csv", index=False)
    (tmp_path / "events.csv").write_text("user_id,item_id,category_id,timestamp\n100,5,0,600\n101,6,1,601\n")
    extend = ("prepare", "--extend", folder / "data")
    names = (str(tmp_path / "tomorrow.csv"),)
    code, said, errors = run_dare(tmp_path, *extend, "--impressions", names[0], "--out", tmp_path / "tomorrow")
    assert code == 0, errors
    assert "impressions alone, without labels, to be scored after day 0 of the chain: 1 new items, 1 new users" in said
    manifest = Manifest.read(tmp_path / "tomorrow")
    assert not manifest.labeled
    assert manifest.counts.impressions_left_out == {"no_events": 1}
    assert not list((tmp_path / "tomorrow").glob("history-*"))
    table = scored(run, tmp_path / "tomorrow", tmp_path / "scores", impressions=names)
    assert table["item_id"].tolist() == [1, 2, 999_999, 4]
    mine = pq.read_table(tmp_path / "scores" / "impressions-00000.parquet").to_pandas()
    assert mine["score"].notna().tolist() == [True, True, True, False, True]
    logs = ("--events", tmp_path / "events.csv", "--impressions", tmp_path / "shown.csv")
    code, _, errors = run_dare(tmp_path, *extend, *logs, "--out", tmp_path / "day")
    assert code == 0, errors
    later = scored(run, tmp_path / "day", tmp_path / "later", split="train")
    pd.testing.assert_series_equal(later["logit"], table["logit"])
    assert later["label"].tolist() == [0, 1, 0, 1]
    # And labels may be there: then it can be measured.
    names = ("--impressions", tmp_path / "shown.csv")
    code, said, errors = run_dare(tmp_path, *extend, *names, "--out", tmp_path / "labeled")
    assert code == 0, errors
    assert "impressions alone, with labels" in said
    evaluation = evaluate_run(run, "test", "best", tmp_path / "labeled", CPU)["label"]
    assert evaluation.auc == roc_auc_score(later["label"], later["logit"])


def test_a_column_that_would_clash(folder: Path, run: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.parquet"
    columns = {"user_id": [100], "item_id": [1], "category_id": [1], "timestamp": [500], "score": [1.0]}
    pq.write_table(pa.table(columns), new)
    data = prepared(folder, "clash", [new], impressions={"label": None})
    assert len(scored(run, data, tmp_path / "out")) == 1
    with pytest.raises(UserError, match="a column called score"):
        scored(run, data, tmp_path / "other", impressions=(str(new),))


def test_a_change_between_the_ends_of_a_large_file(folder: Path, run: Path, tmp_path: Path) -> None:
    """The fingerprint is of the first and the last MiB: a change between them is seen line by line."""
    new = tmp_path / "new.csv"
    line = f"100,1,1,500,{'x' * 1000}\n"
    new.write_text("user_id,item_id,category_id,timestamp,note\n" + line * 2500)
    data = prepared(folder, "large", [new], impressions={"label": None})
    scored(run, data, tmp_path / "out", impressions=(str(new),))
    content = bytearray(new.read_bytes())
    middle = content.index(b"\n", len(content) // 2) + 1
    content[middle : middle + 6] = b"100,2,"
    new.write_bytes(content)
    with pytest.raises(UserError, match=r"new.csv has changed since"):
        scored(run, data, tmp_path / "other", impressions=(str(new),))
    assert not (tmp_path / "other").exists()


def test_ids_that_are_text(folder: Path, tmp_path: Path) -> None:
    """With the same lines, whose ids are words: predictions join back to them, also with another data set's numbers."""
    for path in (folder / "events.csv", *(folder / f"day{day}" / "shown.csv" for day in (1, 2))):
        log = pd.read_csv(path)
        log["user_id"], log["item_id"] = "u " + log["user_id"].astype(str), "ß" + log["item_id"].astype(str)
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        log.to_csv((tmp_path / path.parent.name if "day" in str(path) else tmp_path) / path.name, index=False)

    def words(name: str, seed: int) -> Path:
        kinds = {"user_type": "text", "item_type": "text"}
        events = {"files": [str(tmp_path / "events.csv")], **kinds}
        return prepared(tmp_path, name, None, seed=seed, impressions=kinds, events=events)

    run = Run(1, small_settings("epochs=1"), words("data", 1), tmp_path / "run").finish().folder
    names = (str(tmp_path / "day*"),)
    test = scored(run, None, tmp_path / "out", impressions=names)
    joined = test.merge(log_of(tmp_path), on=["file", "line"], suffixes=("", "_log"), validate="one_to_one")
    assert len(joined) == len(test) > 50
    for column in ("user_id", "item_id", "timestamp", "label"):
        assert (joined[column] == joined[f"{column}_log"]).all()
    mine = pq.read_table(tmp_path / "out" / "impressions-00000.parquet").to_pandas()
    assert mine["score"].notna().sum() == (test["file"] == "day1/shown.csv").sum()
    pd.testing.assert_frame_equal(scored(run, words("other", 2), tmp_path / "again"), test)
    shown = tmp_path / "day2" / "shown.csv"
    shown.write_text(shown.read_text().replace("u 105", "u 106", 1))
    with pytest.raises(UserError, match=r"day2/shown.csv has changed since"):
        scored(run, None, tmp_path / "changed", impressions=names)
