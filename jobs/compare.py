"""`dare compare`: finished runs side by side."""

import json as json_format
import sys
from pathlib import Path
from typing import Annotated

import typer


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs.")],
    json: Annotated[bool, typer.Option("--json", help="End standard output with one JSON object.")] = False,
) -> None:
    """Print the test metrics of runs, and the settings in which they differ."""
    from rich.console import Console
    from rich.table import Table

    from pipeline.compare import METRICS, distinct_names
    from pipeline.compare import compare as side_by_side

    rows = side_by_side(runs)
    keys = list(rows[0]["settings"])
    table = Table("run", "model", *(name.replace("_", " ") for name in METRICS), *keys)
    for row, name in zip(rows, distinct_names(runs), strict=True):
        settings = ["" if row["settings"][key] is None else str(row["settings"][key]) for key in keys]
        metrics = ["" if row[name] is None else f"{row[name]:.4f}" for name in METRICS]
        table.add_row(name, row["model"], *metrics, *settings)
    # Where nobody looks, lines are as long as they need to be.
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)
    if json:
        print(json_format.dumps({"runs": rows}))
