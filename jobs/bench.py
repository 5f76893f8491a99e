"""`dare bench`: timings of parts, as ratios of two sides that compute the same thing."""

import typer

from jobs.bench_reader import bench_reader

bench = typer.Typer(help="Measure parts of the pipeline against plain references.", no_args_is_help=True)
bench.command("reader")(bench_reader)
