"""`dare bench ahead`: training steps with and without the next batch's ids on their way."""

import json as json_format
from dataclasses import asdict
from typing import Annotated

import typer


def bench_ahead(
    json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> None:
    """Compare steps of two processes on this machine that begin the next batch's search with steps that do not."""
    from benchmarks.ahead import measure  # Loads torch, which takes a while.

    print(f"{'targets':>8}{'N':>7}{'dim':>5}{'plain ms':>10}{'ahead ms':>10}{'ratio':>7}")
    found = []
    for step in measure():
        found.append(step)
        print(
            f"{step.targets:>8,}{step.length:>7,}{step.dim:>5}{step.plain_ms:>10,.1f}{step.ahead_ms:>10,.1f}"
            f"{step.ratio:>7.2f}",
            flush=True,
        )
    if json:
        print(json_format.dumps({"steps": [asdict(step) for step in found]}))
