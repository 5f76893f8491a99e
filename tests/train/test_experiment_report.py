"""Tables, comparisons and the accuracy floor of an experiment, from results that are made up."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.experiment import charts
from pipeline.experiment.bootstrap import Comparison
from pipeline.experiment.folder import Documents
from pipeline.experiment.report import all_tables, write_report
from pipeline.experiment.results import Result, below, write_results
from pipeline.reporting.page import Entry, Page, ReportTable, Section, markdown
from schemas.experiment import AccuracyFloor, ExperimentSettings

EXPERIMENT = ExperimentSettings.model_validate(
    {
        "name": "made-up",
        "data": {"shop": {"folder": "shop"}},
        "models": {"A|B": {"model": "dare", "paper": {"shop": {16: 0.9}}}, "C": {"model": "twin"}},
        "dims": [16, 64],
        "seeds": [1, 2, 3],
    }
)


def result(label: str, seed: int, auc: float | None, dim: int = 16, **changes: object) -> Result:
    values = dict.fromkeys(Result.__dataclass_fields__) | {
        "data": "shop",
        "label": label,
        "model": "dare",
        "dim": dim,
        "seed": seed,
        "state": "unfinished" if auc is None else "finished",
        "auc": auc,
        "log_loss": None if auc is None else 1 - auc,
        "table_parameters": 12000,
        "dense_parameters": 345,
        "run": f"{label[0]}{dim}s{seed}",
    }
    return Result(**(values | changes))  # type: ignore[arg-type]


RESULTS = [
    *(result("A|B", seed, auc) for seed, auc in ((1, 0.70), (2, 0.72), (3, 0.74))),
    *(result("C", seed, auc) for seed, auc in ((1, 0.71), (2, 0.75), (3, None))),
    *(result(label, seed, None, dim=64) for label in ("A|B", "C") for seed in (1, 2, 3)),
]


def texts(table: ReportTable) -> list[list[str]]:
    return [[("*" if entry.bold else "") + entry.text for entry in row] for row in table.rows]


def test_tables_have_means_deviations_and_the_papers_figures() -> None:
    tables = {section.title: section.table for section in all_tables(EXPERIMENT, RESULTS, []) if section.table}
    auc = tables["Test AUC"]
    assert auc.header == ["", "shop, d 16", "paper", "shop, d 64"]
    assert texts(auc) == [
        ["A|B", ".7200 ± .0200", ".90000", ""],
        ["C", "*.7300 ± .0283 (2 of 3)", "", ""],
    ]
    assert texts(tables["Test log loss"])[1] == ["C", "*.2700 ± .0283 (2 of 3)", ""]
    assert texts(tables["Parameters"])[0][1] == "12,000 + 345"


def test_headers_of_markdown_are_escaped_as_cells_are() -> None:
    table = ReportTable(["", "A|B"], [[Entry("a|b"), Entry("1", bold=True)]])
    assert markdown(Page("", [], [Section(table=table)])).splitlines()[-3:] == [
        *("|  | A\\|B |", "| --- | --- |", "| a\\|b | **1** |")
    ]


def write_scores(out: Path, run: str, user_N: np.ndarray, label_N: np.ndarray, score_N: np.ndarray) -> None:
    (out / run / "scores").mkdir(parents=True)
    columns = {"user_id": user_N, "label": label_N.astype(np.int8), "score": score_N.astype(np.float32)}
    pq.write_table(pa.table(columns), out / run / "scores" / "part-00000.parquet")


def test_pairs_are_of_common_seeds_and_the_better_one_is_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    user_N, label_N = rng.integers(0, 40, 2000), rng.random(2000) < 0.3
    for each in RESULTS[:5]:
        write_scores(tmp_path, each.run, user_N, label_N, label_N + rng.normal(size=2000))
    pairs = Comparison(tmp_path).pairs(RESULTS)
    (pair,) = pairs
    assert (pair.first, pair.second, pair.seeds) == ("C", "A|B", 2)
    assert pair.of.difference == pytest.approx((0.71 + 0.75) / 2 - (0.70 + 0.72) / 2)
    assert -0.05 < pair.of.low < pair.of.high < 0.05  # the scores are alike, whatever the results claim
    titles = [section.title for section in all_tables(EXPERIMENT, RESULTS, pairs)]
    assert titles[:2] == ["Test AUC", "Differences of AUC, shop, d 16"]


def test_predictions_of_other_users_are_refused(tmp_path: Path) -> None:
    for place, each in enumerate((RESULTS[0], RESULTS[3])):
        write_scores(tmp_path, each.run, np.arange(9) + place, np.arange(9) % 2 > 0, np.arange(9.0))
    with pytest.raises(ValueError, match="not of the same users"):
        Comparison(tmp_path).pairs([RESULTS[0], RESULTS[3]])


def test_the_floor_names_what_is_below_missing_or_unknown() -> None:
    def faults(**floors: float) -> list[str]:
        by_label = {label: {"auc": auc, "tolerance": 0.01} for label, auc in floors.items()}
        document = {"experiment": "made-up", "floors": {"shop": {16: by_label}}}
        return below(AccuracyFloor.model_validate(document), RESULTS[3:5])

    assert faults(C=0.7399) == []
    assert faults(C=0.7401) == ["C on shop, d 16: AUC 0.7300, 0.7401 expected with a tolerance of 0.01"]
    assert faults(C=0.7, D=0.6) == ["D on shop, d 16: no result, 0.6000 expected"]
    assert faults() == ["C on shop, d 16: not in the file"]


def test_results_are_read_back_as_they_were(tmp_path: Path) -> None:
    write_results(RESULTS, tmp_path / "results.parquet")
    assert [Result(**row) for row in pq.read_table(tmp_path / "results.parquet").to_pylist()] == RESULTS
    assert [path.name for path in tmp_path.iterdir()] == ["results.parquet"]


def test_what_cannot_be_written_beside_running_cells_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = Documents(tmp_path, EXPERIMENT, [], {}, "dare experiment")
    (tmp_path / "results.parquet").mkdir()
    documents.cell_ended()
    (told,) = caplog.messages
    assert told.startswith("results or report cannot be written now: ")
    assert "results.parquet" in told
    with pytest.raises(OSError):
        documents.write()


def test_replicates_are_computed_once(tmp_path: Path) -> None:
    scores = tmp_path / "run/scores"
    scores.mkdir(parents=True)
    columns = {"user_id": [1, 1, 2, 2, 3], "label": [1, 0, 1, 0, 1], "score": [0.9, 0.2, 0.4, 0.6, 0.7]}
    pq.write_table(pa.table(columns), scores / "part-0.parquet")
    results = [result(label, 1, 0.8, run="run") for label in ("A|B", "C")]
    first = Comparison(tmp_path).pairs(results)
    (scores / "part-0.parquet").unlink()
    assert Comparison(tmp_path).pairs(results) == first


def test_the_page_escapes_texts_and_has_ids_of_its_own(tmp_path: Path) -> None:
    failed = result("C", 3, None, state="failed", error="<script>alert(1)</script>")
    for each in RESULTS[:5]:
        (tmp_path / each.run).mkdir()
        (tmp_path / each.run / "validations.jsonl").write_text('{"step": 10, "auc": 0.6}\n{"step": 20, "auc": 0.7}\n')
    write_report(tmp_path, EXPERIMENT, [*RESULTS[:5], failed, *RESULTS[6:]], [], "dare experiment <x>")
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "<script" not in page
    assert "shop, C, d 16, seed 3: &lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<code>dare experiment &lt;x&gt;</code>" in page
    assert page.count("<svg") == 3
    ids = re.findall(r'(?<!\w)id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 3
    assert {one or other for one, other in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)} <= set(ids)
    markdown = (tmp_path / "report.md").read_text()
    assert "| A\\|B | .7200 ± .0200 | .90000 |  |" in markdown
    assert "| C | **.7300 ± .0283 (2 of 3)** |  |  |" in markdown


def test_the_same_results_give_the_same_charts() -> None:
    columns = [("shop", 16)]
    assert charts.accuracy(RESULTS[:5], columns) == charts.accuracy(RESULTS[:5], columns)
    assert charts.accuracy(RESULTS[:5], columns) != charts.accuracy(RESULTS[:4], columns)
