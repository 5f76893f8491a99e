"""Commands that list: `dare runs`, `dare compare` and `dare models`."""

from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from jobs.options import Json, console_for_tables

if TYPE_CHECKING:
    from embeddings.model import SearchPlace

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
    """List runs: state, step, best validation AUC, test AUC, samples/s, torchx job."""
    from pipeline.runs.listing import find_runs, run_state

    states = [run_state(path) for path in find_runs(folder)]
    if not states:
        print(f"{folder}: no runs")
    else:
        table = Table("run", "model", "state", "step", "best validation AUC", "test AUC", "samples/s", "torchx job")
        for run in states:
            path = Path(run.run)
            step = "/".join(str(value) for value in (run.step, run.steps) if value is not None)
            numbers = ["" if value is None else f"{value:.4f}" for value in (run.best_validation_auc, run.test_auc)]
            speed = "" if run.samples_per_s is None else f"{run.samples_per_s:,.0f}"
            # The folder itself may be a run: its name relative to itself would be a dot.
            name = str(path) if path == folder else str(path.relative_to(folder))
            table.add_row(name, run.model or "", run.state, step, *numbers, speed, run.app or "")
        console_for_tables(240).print(table)
    # Below the table, for those that somebody should look after.
    for run in states:
        if run.error:
            print(f"{run.run}: {run.state}: {run.error}")
        elif run.state in ("stopped", "died"):
            print(f"{run.run}: {run.state}; the same command {_going_on(run.checkpoint_step)}")
    if json:
        print(dumps({"runs": [asdict(run) for run in states]}))


def _going_on(checkpoint_step: int | None) -> str:
    return "begins anew" if checkpoint_step is None else f"goes on after step {checkpoint_step}"


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs.")],
    json: Json = False,
) -> None:
    """Print the test metrics of runs, and the settings in which they differ."""
    from pipeline.runs.comparison import METRICS, distinct_names
    from pipeline.runs.comparison import compare as side_by_side

    rows = side_by_side(runs)
    keys = list(rows[0]["settings"])
    table = Table("run", "model", *(name.replace("_", " ") for name in METRICS), *keys)
    for row, name in zip(rows, distinct_names(runs), strict=True):
        settings = ["" if row["settings"][key] is None else str(row["settings"][key]) for key in keys]
        metrics = ["" if row[name] is None else f"{row[name]:.4f}" for name in METRICS]
        table.add_row(name, row["model"], *metrics, *settings)
    console_for_tables(200).print(table)
    if json:
        print(dumps({"runs": rows}))


def models(
    json: Json = False,
) -> None:
    """List the models: what each is, and what its search compares."""
    from embeddings.models import MODELS

    rows = [
        {
            "name": name,
            "summary": (model.__doc__ or "").strip().splitlines()[0].rstrip(".").replace("``", ""),
            "searched": model.searched,
            "tables": len({*vars(model.roles).values()}),
        }
        for name, model in MODELS.items()
    ]
    wide = max(len(str(row["name"])) for row in rows)
    for row, model in zip(rows, MODELS.values(), strict=True):
        print(f"{row['name']:{wide}}  {row['summary']}; search: {SEARCHES[model.searched]}")
    if json:
        print(dumps({"models": rows}))
