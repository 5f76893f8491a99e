"""`dare bench reader`: speed and size of the stream and of what it reads."""

import json as json_format
from typing import Annotated

import typer


def bench_reader(
    users: Annotated[int, typer.Option(min=512, help="Users of the generated data set.")] = 20_000,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions of each timing; medians are reported.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Reader threads of both sides.")] = 2,
    history_length: Annotated[int, typer.Option(min=1, help="Behaviours that a target sees.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Targets in a batch.")] = 2048,
    json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> None:
    """Measure the stream: row groups against plain pyarrow, batches per second, bytes against rows of samples."""
    from benchmarks.reader import as_dict, measure  # Loads torch, which takes a while.

    figures = as_dict(measure(users, rounds, threads, history_length, batch_size))
    if json:
        print(json_format.dumps(figures))
    else:
        for name, figure in figures.items():
            print(f"{name:27} {figure:>14,}")
