"""`dare bench`: timings of parts, as ratios of two sides that compute the same thing.

The program finds these commands through the entry point `bench` of the group `dare.commands`. Each loads what it
measures when it is called: this file is read by `dare --help`, which must not wait for torch.
"""

import json as json_format
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Annotated, Any

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
    from benchmarks.reader import as_dict, measure

    figures = as_dict(measure(users, rounds, threads, history_length, batch_size))
    if json:
        print(json_format.dumps(figures))
    else:
        for name, figure in figures.items():
            print(f"{name:27} {figure:>14,}")


def bench_item_features(
    users: Annotated[int, typer.Option(min=512, help="Users of the generated data sets.")] = 10_000,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions of each timing; medians are reported.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Reader threads.")] = 2,
    json: Annotated[bool, typer.Option("--json", help="End with one JSON list.")] = False,
) -> None:
    """Measure features of items beside their row, gathered by the reader, against features in each behaviour."""
    from benchmarks.item_features import measure

    _show([asdict(case) for case in measure(users, rounds, threads)], json)


def bench_ingest(
    events: Annotated[int, typer.Option(min=1000, help="Events of each log.")] = 20_000_000,
    json: Annotated[bool, typer.Option("--json", help="End with one JSON list.")] = False,
) -> None:
    """Measure `dare prepare`: integer ids without features, and text ids of 22 characters with four features."""
    from benchmarks.ingest import measure

    _show([asdict(case) for case in measure(events)], json)


def bench_extend(
    users: Annotated[int, typer.Option(min=100, help="Users of the first day.")] = 100_000,
    behaviors: Annotated[int, typer.Option(min=1, help="Behaviours of each of them.")] = 200,
    of_day: Annotated[int, typer.Option(min=1, help="Events of a user on the day that is added.")] = 10,
    share: Annotated[
        list[float] | None, typer.Option(min=0, max=1, help="Share of the users who have events then; repeatable.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="End with one JSON list.")] = False,
) -> None:
    """Measure a day that is added to a chain: against preparing everything anew, which gives the same histories."""
    from benchmarks.extend import measure

    _show([asdict(case) for case in measure(users, behaviors, of_day, tuple(share or (0.001, 0.01, 0.1)))], json)


def bench_search(
    rows: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 4_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions of each timing; the shortest is reported.")] = 7,
    json: Annotated[bool, typer.Option("--json", help="End with one JSON list.")] = False,
) -> None:
    """Measure top-K search: against gather + bmm + topk in torch, and against the reading of memory."""
    from benchmarks.search import measure

    _show([asdict(case) for case in measure(rows, rounds)], json)


def bench_shard_search(
    ranks: Annotated[int, typer.Option(min=1, help="Processes, a thread each, that talk through gloo.")] = 2,
    rows: Annotated[int, typer.Option(min=2, help="Rows of the item table.")] = 1_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions of each timing; medians are reported.")] = 5,
    json: Annotated[bool, typer.Option("--json", help="End with one JSON list.")] = False,
) -> None:
    """Measure search on the shards against TorchRec's way, after checking that both find the same."""
    from benchmarks.shard_search import measure

    _show(measure(ranks, rows, rounds), json)


def bench_search_features(
    ranks: Annotated[int, typer.Option(min=1, help="Processes, a thread each, that talk through gloo.")] = 2,
    targets: Annotated[int, typer.Option(min=1, help="Targets of each, of a batch.")] = 1024,
    length: Annotated[int, typer.Option(min=1, help="Behaviours that a target sees.")] = 200,
    items: Annotated[int, typer.Option(min=2, help="Items.")] = 1_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions of each timing; medians are reported.")] = 9,
    json: Annotated[bool, typer.Option("--json", help="End with one JSON list.")] = False,
) -> None:
    """Measure what features of items cost a search on the shards: with each behaviour, and beside the items' rows."""
    from benchmarks.search_features import measure

    _show(measure(ranks, targets, length, items, rounds), json)


def bench_plan(
    topology: Annotated[
        Path | None,
        typer.Option(help="File that `dare plan --calibrate` wrote a moment ago; without it, measure anew."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> None:
    """Compare the steps that `dare plan` estimates with steps of two processes on this machine."""
    from benchmarks.plan_estimates import measure
    from pipeline.planning.calibration import calibrated
    from schemas.cluster import ClusterSettings
    from schemas.settings import load_settings

    cluster = load_settings(ClusterSettings, [topology]) if topology else calibrated()
    print(f"{cluster.device_name}; {cluster.measured}")
    print(f"{'search':8}{'targets':>8}{'N':>7}{'dim':>5}{'K':>4}{'estimated ms':>14}{'measured ms':>13}{'ratio':>7}")
    steps = []
    for step in measure(cluster):
        steps.append(step)
        print(
            f"{step.search:8}{step.targets:>8,}{step.length:>7,}{step.dim:>5}{step.retrieved:>4}"
            f"{step.estimated_ms:>14,.1f}{step.measured_ms:>13,.1f}{step.ratio:>7.2f}",
            flush=True,
        )
    worst = max(max(step.ratio, 1 / step.ratio) for step in steps)
    print(f"off by a factor of {worst:.2f} at most")
    if json:
        print(json_format.dumps({"steps": [asdict(step) for step in steps], "worst": round(worst, 3)}))


def bench_prefetch(
    json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> None:
    """Compare steps of two processes on this machine that prefetch the next batch's search with steps that do not."""
    from benchmarks.prefetch import measure

    print(f"{'targets':>8}{'N':>7}{'dim':>5}{'plain ms':>10}{'prefetch ms':>12}{'ratio':>7}")
    steps = []
    for step in measure():
        steps.append(step)
        print(
            f"{step.targets:>8,}{step.length:>7,}{step.dim:>5}{step.plain_ms:>10,.1f}{step.prefetch_ms:>12,.1f}"
            f"{step.ratio:>7.2f}",
            flush=True,
        )
    if json:
        print(json_format.dumps({"steps": [asdict(step) for step in steps]}))


def bench_train(
    items: Annotated[int, typer.Option(min=1, help="Rows of each item table.")] = 4_000_000,
    batch: Annotated[int, typer.Option(min=2, help="Targets of a batch.")] = 2048,
    threads: Annotated[int, typer.Option(min=1, help="Threads of both sides.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions of each timing; medians are reported.")] = 5,
    tuned: Annotated[
        bool, typer.Option("--tuned", help="Give plain torch a fused Adam, and memory that is kept.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="End with one JSON list.")] = False,
) -> None:
    """Measure training steps against the same model in plain torch, after checking that the losses are the same."""
    from benchmarks.training import measure

    _show(measure(items, batch, threads, rounds, tuned=tuned), json)


def bench_checkpoint(
    ranks: Annotated[int, typer.Option(min=1, help="Processes, a thread each, that talk through gloo.")] = 1,
    items: Annotated[int, typer.Option(min=1, help="Rows of each item table.")] = 100_000,
    batch: Annotated[int, typer.Option(min=1, help="Targets of a step.")] = 2048,
    steps: Annotated[str, typer.Option(help="Steps after which a delta is measured, rising.")] = "1,10",
    json: Annotated[bool, typer.Option("--json", help="End with one JSON list.")] = False,
) -> None:
    """Measure bytes and seconds of delta checkpoints against full ones, after checking that both load the same."""
    from benchmarks.checkpoint import measure

    _show([asdict(case) for case in measure(ranks, items, batch, [*map(int, steps.split(","))])], json)


def bench_packing(
    ranks: Annotated[int, typer.Option(min=2, help="Ranks to send to; none of them is there.")] = 1024,
    columns: Annotated[int, typer.Option(min=1, help="Columns of an exchange.")] = 30,
    values: Annotated[int, typer.Option(min=1, help="Rows of a column.")] = 40_960,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions; the median is reported.")] = 50,
    json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> None:
    """Measure the host's time to send columns to many ranks, without the time that they are on their way."""
    from benchmarks.packing import measure

    _show(asdict(measure(ranks, columns, values, rounds)), json)


def bench_warm_start(
    ranks: Annotated[int, typer.Option(min=1, help="Processes, a thread each, that talk through gloo.")] = 2,
    rows: Annotated[int, typer.Option(min=100, help="Items of the day before.")] = 100_000,
    grown_rows: Annotated[int, typer.Option(min=100, help="Items of the new day.")] = 200_000,
    dim: Annotated[int, typer.Option(min=4, help="Dim of both item tables, a multiple of 4.")] = 16,
    json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> None:
    """Measure `dare train --from` after an item table has grown: seconds and memory."""
    from benchmarks.warm_start import measure

    _show(asdict(measure(ranks, rows, grown_rows, dim)), json)


def bench_attention_dim(
    rows: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 4_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions of each timing; the shortest counts.")] = 7,
    figure: Annotated[Path | None, typer.Option(help="PNG file to draw into.")] = None,
    json: Annotated[bool, typer.Option("--json", help="End with one JSON list.")] = False,
) -> None:
    """Measure how search time falls with K_A."""
    from benchmarks.attention_dim import draw, measure

    figures = measure(rows, rounds)
    for one in figures:
        print(f"{one.dtype:9} K_A {one.dim:4}  {one.rows_per_s:>12,} behaviours/s  time {one.time_vs_128:.3f}")
    if figure is not None:
        draw(figures, rows, figure)
    if json:
        print(json_format.dumps([asdict(one) for one in figures]))


def bench_serve(
    model: Annotated[list[str] | None, typer.Option(help="dare or twin; repeatable. Both, if not given.")] = None,
    length: Annotated[list[int] | None, typer.Option(min=1, help="Behaviours of a history; repeatable.")] = None,
    attention_dim: Annotated[list[int] | None, typer.Option(min=4, help="K_A; repeatable.")] = None,
    rows: Annotated[list[str] | None, typer.Option(help="What the search reads: fp32, bf16, int8; repeatable.")] = None,
    table_rows: Annotated[int, typer.Option(min=2, help="Rows of each item table.")] = 4_000_000,
    retrieved: Annotated[int, typer.Option(min=1, help="K.")] = 20,
    threads: Annotated[int, typer.Option(min=1, help="Threads of both sides.")] = 1,
    requests: Annotated[int, typer.Option(min=1, help="Requests of each timing of ours.")] = 200,
    rounds: Annotated[int, typer.Option(min=1, help="Timings of eager torch; the shortest counts.")] = 3,
    experiment: Annotated[
        Path | None, typer.Option(help="Folder of the experiment attention-dims-completejourney: its loss of AUC.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="End with one JSON list.")] = False,
) -> None:
    """Measure answers to requests of 500 candidates against eager torch, after checking that both say the same."""
    import torch

    from benchmarks.serve import Case, measure

    torch.set_num_threads(threads)
    cases = [
        Case(*of_case)  # type: ignore[arg-type]
        for of_case in product(
            model or ("dare", "twin"),
            attention_dim or (128, 64, 32, 16),
            rows or ("fp32", "bf16", "int8"),
            length or (200, 2000, 10_000),
        )
    ]
    figures = []
    for of_case in measure(cases, table_rows, retrieved, requests, rounds, experiment):
        figures.append(asdict(of_case))
        if not json:
            _show(figures[-1], json=False)
    if json:
        print(json_format.dumps(figures))


def bench_serve_http(
    models: Annotated[
        list[Path], typer.Argument(metavar="M...", help="Exported models; the first one answers, a soak swaps them.")
    ],
    length: Annotated[int, typer.Option(min=0, help="Behaviours of a history.")] = 2000,
    candidates: Annotated[int, typer.Option(min=1, help="Candidates of a request.")] = 500,
    requests: Annotated[int, typer.Option(min=1, help="Requests of the timing of HTTP's own cost.")] = 300,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of the highest load, and of half of it.")] = 20,
    soak: Annotated[
        float, typer.Option(min=0, help="Minutes of half the highest load with swaps and a kill; 0: none.")
    ] = 0,
    json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> None:
    """Measure `dare serve` over HTTP: what HTTP costs, answers under load, and a soak with swaps and a kill."""
    from benchmarks.serve_http import measure

    figures = {
        name: asdict(part) for name, part in measure(models, length, candidates, requests, seconds, soak).items()
    }
    if json:
        print(json_format.dumps(figures))
        return
    for name, part in figures.items():
        _show({"part": name, **part}, json=False)


def bench_serve_quality(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="M...", help="Exports of one checkpoint; the first one is what searches are held to."),
    ],
    run: Annotated[Path, typer.Option(help="The run that they were exported from.")],
    data: Annotated[Path | None, typer.Option(help="Data set; if not given, the one of the run.")] = None,
    targets: Annotated[int | None, typer.Option(min=1, help="About how many test targets; all, if not given.")] = None,
    json: Annotated[bool, typer.Option("--json", help="End with one JSON list.")] = False,
) -> None:
    """Compare exported models with their checkpoint on the test split: probabilities, AUC, what searches keep."""
    import torch

    from benchmarks.serve_quality import measure
    from jobs.ranks import on_all_ranks

    def work(device: torch.device) -> None:
        _show([asdict(one) for one in measure(run, models, data, targets, device)], json)

    on_all_ranks(work)


def _show(figures: Mapping[str, Any] | Sequence[Mapping[str, Any]], json: bool) -> None:
    """Print the figures of one case, or of several, a line each; or all of them as JSON."""
    if json:
        print(json_format.dumps(figures))
        return
    for of_case in [figures] if isinstance(figures, Mapping) else figures:
        print("  ".join(f"{name} {figure}" for name, figure in of_case.items()))


bench = typer.Typer(help="Measure parts of the pipeline against plain references.", no_args_is_help=True)
bench.command("ingest")(bench_ingest)
bench.command("extend")(bench_extend)
bench.command("reader")(bench_reader)
bench.command("item-features")(bench_item_features)
bench.command("search")(bench_search)
bench.command("shard-search")(bench_shard_search)
bench.command("search-features")(bench_search_features)
bench.command("plan")(bench_plan)
bench.command("prefetch")(bench_prefetch)
bench.command("checkpoint")(bench_checkpoint)
bench.command("train")(bench_train)
bench.command("packing")(bench_packing)
bench.command("warm-start")(bench_warm_start)
bench.command("attention-dim")(bench_attention_dim)
bench.command("serve")(bench_serve)
bench.command("serve-http")(bench_serve_http)
bench.command("serve-quality")(bench_serve_quality)
