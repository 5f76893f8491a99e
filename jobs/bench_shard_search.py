"""`dare bench shard-search`: search on the shards against a stock lookup of all behaviours."""

import json as json_format
from typing import Annotated

import typer


def bench_shard_search(
    ranks: Annotated[int, typer.Option(min=1, help="Processes, a thread each, that talk through gloo.")] = 2,
    rows: Annotated[int, typer.Option(min=2, help="Rows of the item table.")] = 1_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions of each timing; medians are reported.")] = 5,
    json: Annotated[bool, typer.Option("--json", help="End with one JSON list.")] = False,
) -> None:
    """Measure search on the shards against TorchRec's way, after checking that both find the same."""
    from benchmarks.shard_search import measure  # Loads torch, which takes a while.

    figures = measure(ranks, rows, rounds)
    if json:
        print(json_format.dumps(figures))
        return
    for of_case in figures:
        print("  ".join(f"{name} {figure}" for name, figure in of_case.items()))
