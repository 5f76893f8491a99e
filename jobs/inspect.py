"""``dare inspect``: what is in a data set."""

import json as json_format
import sys
from pathlib import Path
from typing import Annotated

import typer


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Data set that `dare prepare` wrote.")],
    verify: Annotated[bool, typer.Option("--verify", help="Compare all files with their checksums.")] = False,
    figure: Annotated[Path | None, typer.Option(help="PNG file to draw into.")] = None,
    json: Annotated[bool, typer.Option("--json", help="End standard output with one JSON object.")] = False,
) -> None:
    """Tell what is in a data set: counts, distributions, targets, columns."""
    from rich.console import Console

    from pipeline.inspect.report import print_summary
    from pipeline.inspect.summary import summarize
    from pipeline.output import check_output_file

    if figure is not None:
        if figure.suffix.lower() != ".png":
            raise ValueError(f"--figure {figure}: the figure is a PNG; end its name in .png")
        check_output_file(figure)
    summary = summarize(folder, verify=verify)
    # Where nobody looks, lines are as long as they need to be.
    print_summary(folder, summary, Console(width=None if sys.stdout.isatty() else 160, highlight=False))
    if verify:
        print("all checksums agree with the manifest")
    if figure is not None:
        from pipeline.inspect.figure import draw_figure  # Takes a while to import.

        draw_figure(folder, summary, figure)
        print(f"figure: {figure}")
    if json:
        print(json_format.dumps(summary.to_json()))
