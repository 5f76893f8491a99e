"""`dare bench`: timings of parts, as ratios of two sides that compute the same thing."""

import typer

from jobs.bench_ahead import bench_ahead
from jobs.bench_attention_dim import bench_attention_dim
from jobs.bench_plan import bench_plan
from jobs.bench_reader import bench_reader
from jobs.bench_search import bench_search
from jobs.bench_shard_search import bench_shard_search

bench = typer.Typer(help="Measure parts of the pipeline against plain references.", no_args_is_help=True)
bench.command("reader")(bench_reader)
bench.command("search")(bench_search)
bench.command("shard-search")(bench_shard_search)
bench.command("plan")(bench_plan)
bench.command("ahead")(bench_ahead)
bench.command("attention-dim")(bench_attention_dim)
