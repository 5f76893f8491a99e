"""`dare bench search`: speed of top-K search."""

import json as json_format
from dataclasses import asdict
from typing import Annotated

import typer


def bench_search(
    rows: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 4_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions of each timing; the shortest is reported.")] = 7,
    json: Annotated[bool, typer.Option("--json", help="End with one JSON list.")] = False,
) -> None:
    """Measure top-K search: against gather + bmm + topk in torch, and against the reading of memory."""
    from benchmarks.search import measure  # compiled code is loaded by those who need it

    figures = [asdict(case) for case in measure(rows, rounds)]
    if json:
        print(json_format.dumps(figures))
    else:
        for case in figures:
            print("  ".join(f"{name} {figure}" for name, figure in case.items()))
