"""`dare bench attention-dim`: search time against K_A."""

import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def bench_attention_dim(
    rows: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 4_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions of each timing; the shortest counts.")] = 7,
    figure: Annotated[Path | None, typer.Option(help="PNG file to draw into.")] = None,
    json: Annotated[bool, typer.Option("--json", help="End with one JSON list.")] = False,
) -> None:
    """Measure how search time falls with K_A."""
    from benchmarks.attention_dim import draw, measure  # Compiled code is loaded by those who need it.

    figures = measure(rows, rounds)
    for one in figures:
        print(f"{one.dtype:9} K_A {one.dim:4}  {one.rows_per_s:>12,} behaviours/s  time {one.time_vs_128:.3f}")
    if figure is not None:
        draw(figures, figure)
    if json:
        print(json_format.dumps([asdict(one) for one in figures]))
