"""Commands that list: `dare runs`, `dare compare` and `dare models`."""

from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.options import Json
from pipeline.errors import printable
from pipeline.paths import location

if TYPE_CHECKING:
    from embeddings.model import SearchPlace
    from pipeline.runs.listing import RunState

SEARCHES: "dict[SearchPlace, str]" = {
    "shard": "by score, on the shards of the tables",
    "local": "by score, on the rank of the sample",
    "ids": "by category or by time, without embeddings",
    "none": "none, the whole history is pooled",
}
"""What `CtrModel.searched` means: what a search compares, and where."""


def runs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with runs in it, at any depth.")],
    json: Json = False,
) -> None:
    """List runs: state, step, AUCs (of days before they were learnt, validation, test), samples/s, torchx job."""
    from pipeline.reporting.text_table import table_lines, terminal_width
    from pipeline.runs.listing import find_runs, run_state
    from schemas.documents import one_notice

    with one_notice(folder):
        states = [run_state(path) for path in find_runs(folder)]
    if not states:
        print(f"{printable(folder)}: no runs")
    else:
        header = [
            "run",
            "model",
            "state",
            "step",
            "AUC before",
            "best validation AUC",
            "test AUC",
            "samples/s",
            "begun on",
            "torchx job",
        ]
        rows = [_row(run, folder) for run in states]
        # Most runs are no days, of no torchx job, and begin on no other: a column of nothing would push others out of
        # the line.
        shown = [number for number in range(len(header)) if number not in (4, 8, 9) or any(row[number] for row in rows)]
        table = [[row[number] for number in shown] for row in rows]
        left = [place for place, number in enumerate(shown) if number in (0, 1, 2, 8, 9)]
        print("\n".join(table_lines([header[number] for number in shown], table, left=left, width=terminal_width())))
    # Below the table, for those that somebody should look after.
    for run in states:
        if run.error:
            print(printable(f"{run.run}: {run.state}: {run.error}"))
        elif run.state == "finished" and run.ended_early:
            print(f"{printable(run.run)}: ended early at step {run.step} of {run.steps}: validation.patience ran out")
        elif run.state in ("stopped", "died"):
            print(f"{printable(run.run)}: {run.state}; the same command {_going_on(run.checkpoint_step)}")
    if json:
        print(dumps({"runs": [asdict(run) for run in states]}))


def _row(run: "RunState", folder: Path) -> list[str]:
    path = location(run.run)
    # The folder itself may be a run: its name relative to itself would be a dot.
    name = str(path) if path == folder else str(path.relative_to(folder))
    step = "/".join(f"{value:,}" for value in (run.step, run.steps) if value is not None)
    # An AUC that is not there yet is an empty place, one that is not defined says so.
    validation = _auc(run.best_validation_auc, known=bool(run.validations))
    test = _auc(run.test_auc, known=run.state == "finished")
    speed = "" if run.samples_per_s is None else f"{run.samples_per_s:,.0f}"
    source = "" if run.source is None else location(run.source).name
    before = _auc(run.auc_before, known=False)
    return [name, run.model or "", run.state, step, before, validation, test, speed, source, run.app or ""]


def _auc(value: float | None, *, known: bool) -> str:
    return f"{value:.4f}" if value is not None else "undefined" if known else ""


def _going_on(checkpoint_step: int | None) -> str:
    return "begins anew" if checkpoint_step is None else f"goes on after step {checkpoint_step}"


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs.")],
    json: Json = False,
) -> None:
    """Print the test metrics of runs, and the settings in which they differ."""
    from pipeline.reporting.text_table import table_lines, terminal_width
    from pipeline.runs.comparison import METRICS, data_names, distinct_names
    from pipeline.runs.comparison import compare as side_by_side

    rows = side_by_side(runs)
    names, data = distinct_names(runs), data_names(rows)
    width = terminal_width()
    header = ["run", "model", *["data set"] * bool(data), *METRICS.values()]
    tested = [
        [name, row["model"], *data[index : index + 1], *(_metric(row[metric]) for metric in METRICS)]
        for index, (row, name) in enumerate(zip(rows, names, strict=True))
    ]
    print("\n".join(table_lines(header, tested, left=range(2 + bool(data)), width=width)))
    if data:
        print("the runs were tested on different data sets: metrics of different ones do not compare")
    if keys := list(rows[0]["settings"]):
        print("\n".join(["", *_settings(names, keys, rows, width)]))
    elif len(rows) > 1:
        print("\nno settings differ")
    if json:
        print(dumps({"runs": rows}))


def _settings(names: list[str], keys: list[str], rows: list[dict[str, Any]], width: int | None) -> list[str]:
    """The settings that differ, a row each; or a row for each run, where that takes fewer lines."""
    from pipeline.reporting.text_table import table_lines

    values = [["-" if row["settings"][key] is None else str(row["settings"][key]) for key in keys] for row in rows]
    by_run = [[name, *of_run] for name, of_run in zip(names, values, strict=True)]
    by_setting = [[key, *of_key] for key, of_key in zip(keys, zip(*values, strict=True), strict=True)]
    every = range(1 + max(len(names), len(keys)))
    return min(
        list(table_lines(["setting", *names], by_setting, left=every, width=width or 100)),
        list(table_lines(["run", *keys], by_run, left=every, width=width or 100)),
        key=len,
    )


def _metric(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def models(
    json: Json = False,
) -> None:
    """List the models: what each is, and what its search compares."""
    from embeddings.models import MODELS
    from pipeline.reporting.text_table import table_lines, terminal_width

    rows = [
        {
            "name": name,
            "summary": (model.__doc__ or "").strip().splitlines()[0].rstrip(".").replace("``", ""),
            "searched": model.searched,
            "tables": len({*vars(model.roles).values()}),
        }
        for name, model in MODELS.items()
    ]
    listed = [
        [name, str(row["summary"]), SEARCHES[model.searched]]
        for row, (name, model) in zip(rows, MODELS.items(), strict=True)
    ]
    print("\n".join(table_lines(["model", "what it is", "its search"], listed, left=range(3), width=terminal_width())))
    if json:
        print(dumps({"models": rows}))
