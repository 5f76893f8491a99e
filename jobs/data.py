"""Commands about data: `dare prepare`, `dare synth`, `dare inspect` and `dare stream`."""

import logging
import resource
import time
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from jobs.options import Config, DataSetFolder, Json, Overwrite
from pipeline.errors import printable
from pipeline.progress import stage
from schemas.errors import UserError
from schemas.manifest import Chain, Manifest
from schemas.prepare import PRESETS, PrepareSettings
from schemas.settings import load_settings
from schemas.stream import StreamSettings
from schemas.synth import SynthSettings

_LOGGER = logging.getLogger("dare.data")


def prepare(
    out: Annotated[Path, typer.Option(help="Folder of the data set; appears when it is whole.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, e.g. split.negatives=4.")
    ] = None,
    preset: Annotated[str, typer.Option(help=f"Settings of a known log: {', '.join(PRESETS)}.")] = "generic",
    config: Config = None,
    events: Annotated[list[str] | None, typer.Option(help="File or glob of behaviours; repeatable.")] = None,
    impressions: Annotated[
        list[str] | None, typer.Option(help="File or glob of impressions with labels; repeatable.")
    ] = None,
    engine: Annotated[Literal["duckdb", "spark"] | None, typer.Option(help="What computes it.")] = None,
    extend: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Add a day to the chain that this data set ends; without --events, impressions that are to be scored.",
        ),
    ] = None,
    dictionaries: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Use this data set's ids and encodings as they are.")
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Turn logs of events into user-history shards."""
    from pipeline.ingest.chain import Base
    from pipeline.ingest.day_settings import day_settings
    from pipeline.ingest.prepare import prepare as run

    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: unknown; known are {', '.join(PRESETS)}")
    # A shell that has expanded a glob leaves file names here: the likeliest mistake gets an answer of its own.
    for text in overrides or []:
        if "=" not in text:
            raise UserError(
                f"{text!r}: an override is written key=value; if it is a file: --events and --impressions take one "
                "each, so repeat the option, or give it a glob in quotes"
            )
    if extend is not None and dictionaries is not None:
        raise UserError("--extend and --dictionaries: a day adds to dictionaries, or they stay as they are; give one")
    # Options win over files, and ``key=value`` over both.
    values: dict[str, Any] = {}
    if events:
        values["events"] = {"files": events}
    layers: list[Path | dict[str, Any]] = [] if extend is not None and preset == "generic" else [PRESETS[preset]]
    if impressions:
        values |= {"impressions": {"files": impressions}}
    if impressions and extend is None:
        # In place of the preset's split; the user's own files may say how impressions are split.
        layers.append({"split": {"kind": "impressions"}})
    if engine is not None:
        values["engine"] = engine
    layers += config or []
    former = extend if extend is not None else dictionaries
    base = None if former is None else Base.open(former, closed=extend is None)
    if base is not None and not base.closed:
        settings = day_settings(base, layers, overrides or [], values)
    else:
        settings = load_settings(PrepareSettings, layers, overrides or [], values)
    started = time.monotonic()
    manifest = run(settings, out, overwrite=overwrite, base=base)
    for reason in manifest.skipped:
        _LOGGER.info("left out: %s", reason)
    result = _counts(manifest)
    counts = manifest.counts
    print(
        f"{printable(out)}: {counts.users:,} users ({counts.users_left_out:,} left out), "
        f"{counts.behaviors:,} behaviours, {counts.items:,} items, {counts.categories:,} categories; "
        f"targets: {counts.train.targets:,} train, {counts.validation.targets:,} validation, "
        f"{counts.test.targets:,} test; {result['bytes'] / 2**20:,.1f} MiB"
    )
    if manifest.skipped:
        print(f"{len(manifest.skipped):,} corrupt files were left out")
    for log in counts.logs():
        why = "".join(f", {number:,} {reason.replace('_', ' ')}" for reason, number in log.left_out.items())
        print(f"{log.role}: {log.read:,} read, {log.kept:,} kept{why}; {log.repeated:,} repeat another one")
    if counts.items_below_min_count:
        why = (
            "are rarer than items.min_count" if manifest.dictionaries_of is None else "have none in those dictionaries"
        )
        print(f"items: {counts.items_below_min_count:,} {why}: they have no row of their own")
    if manifest.chain is not None and manifest.without_events:
        print(
            f"impressions alone, {'with' if manifest.labeled else 'without'} labels, to be scored after day "
            f"{manifest.chain.number - 1} of the chain: {manifest.chain.new_items:,} new items, "
            f"{manifest.chain.new_users:,} new users; no day can follow"
        )
    elif manifest.chain is not None:
        print(_day(manifest.chain))
    for feature in manifest.features:
        rare = f", {feature.below_min_count:,} below min_count" if feature.below_min_count else ""
        size = "a number" if feature.is_number else f"{feature.rows:,} ids"
        print(
            f"feature {feature.name} of {feature.of}: {size}; {feature.values:,} places, "
            f"{feature.missing:,} missing{rare}"
        )
    if json:
        cost = {"seconds": round(time.monotonic() - started, 2), "peak_mib": _peak_kib() // 1024}
        of_logs = ("events", "impr", "items")
        told = {name: value for name, value in counts.model_dump().items() if name.startswith(of_logs)}
        told |= {f"{log.role}_kept": log.kept for log in counts.logs()}
        keys = {"of", "kind", "rows", "missing", "below_min_count"}
        features = {feature.name: feature.model_dump(include=keys) for feature in manifest.features}
        if manifest.chain is not None:
            told["chain"] = manifest.chain.summary()
        told |= {"features": features, "users_left_out_by_reason": counts.users_left_out_by_reason}
        print(dumps(result | told | cost))


def _day(chain: Chain) -> str:
    rows = (
        ""
        if chain.rows is None
        else f"; {chain.rows:,} rows of the item table, {chain.rows_given:,} given on this day, "
        f"{chain.rows_free:,} free; {chain.evicted:,} items evicted"
    )
    return (
        f"day {chain.number} of the chain: {chain.new_items:,} new items, {chain.new_users:,} new users{rows}; "
        f"layers of histories: {len(chain.layers):,}"
    )


def _counts(manifest: Manifest) -> dict[str, int]:
    counts = manifest.counts
    return {
        "users": counts.users,
        "users_left_out": counts.users_left_out,
        "behaviors": counts.behaviors,
        "items": counts.items,
        "categories": counts.categories,
        "train": counts.train.targets,
        "validation": counts.validation.targets,
        "test": counts.test.targets,
        "skipped_files": len(manifest.skipped),
        "bytes": sum(file.bytes for file in (*manifest.shards, *manifest.files)),
    }


def synth(
    out: Annotated[Path, typer.Option(help="File to write: .parquet, or .csv as Taobao's UserBehavior.csv.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, e.g. events=1000000.")
    ] = None,
    impressions: Annotated[Path | None, typer.Option(help=".parquet file to write impressions with labels to.")] = None,
    config: Config = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    json: Json = False,
) -> None:
    """Generate behaviours of any size, whose relevance to a target is known."""
    settings = load_settings(SynthSettings, config or [], overrides or [])
    from pipeline.synth.files import synthesize  # The compiler behind it takes a while to import.

    report = synthesize(settings, out, impressions, overwrite=overwrite)
    print(
        f"{out}: {report.events:,} behaviours of {report.users:,} users in {report.seconds:.1f} s "
        f"({report.events / report.seconds:,.0f} a second)"
    )
    if impressions:
        chances = f"AUC of the true chances {report.bayes_auc:.4f}"
        print(f"{printable(impressions)}: {report.impressions:,} impressions; {chances}")
    if json:
        print(dumps(asdict(report) | {"peak_mib": round(_peak_kib() / 1024, 1)}))


def _peak_kib() -> int:
    """Return the most memory that this process has had, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def inspect(
    folder: DataSetFolder,
    verify: Annotated[bool, typer.Option("--verify", help="Compare all files with their checksums.")] = False,
    figure: Annotated[Path | None, typer.Option(help="PNG file to draw into.")] = None,
    json: Json = False,
) -> None:
    """Tell what is in a data set: counts, distributions, targets, columns."""
    from pipeline.files import check_output_file
    from pipeline.inspect.summary import summarize
    from pipeline.inspect.terminal import summary_lines
    from pipeline.reporting.text_table import terminal_width

    if figure is not None:
        if figure.suffix.lower() != ".png":
            raise UserError(f"--figure {figure}: the figure is a PNG; end its name in .png")
        # Before the data set is read, which may take a while.
        check_output_file(figure)
    summary = summarize(folder, verify=verify)
    print("\n".join(summary_lines(folder, summary, terminal_width())))
    if verify:
        print("all checksums agree with the manifest")
    if figure is not None:
        from pipeline.inspect.figure import draw_figure  # Takes a while to import.

        draw_figure(folder, summary, figure)
        print(f"figure: {figure}")
    if json:
        print(dumps(summary.to_json()))


def stream(
    folder: DataSetFolder,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, e.g. batch_size=512.")
    ] = None,
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="What to read.")] = "train",
    config: Config = None,
) -> None:
    """Read one epoch of a split, and tell what came."""
    settings = load_settings(StreamSettings, config or [], overrides or [])
    from embeddings.machine import check_stream
    from pipeline.stream.history_stream import HistoryStream

    manifest = Manifest.read(folder)
    check_stream(settings, manifest)
    with HistoryStream(folder, split, settings, seed=0, shuffle=True) as batches:
        print(f"{split}: {batches.targets:,} targets in {batches.steps_per_epoch:,} batches of {settings.batch_size:,}")
        targets, users, positives, behaviors, windows = 0, 0, 0, 0, 0
        started = time.monotonic()
        with stage("read an epoch", batches.steps_per_epoch, "batches") as running:
            for batch in batches:
                # The first batch tells what one looks like.
                if not targets:
                    print(batch.describe())
                targets += len(batch)
                users += batch.users
                positives += int((batch.label_T > 0).sum())
                behaviors += sum(len(history.item_M) for history in batch.histories.values())
                windows += sum(int((history.end_T - history.start_T).sum()) for history in batch.histories.values())
                running.advance()
        seconds = time.monotonic() - started
    labels = f"{positives / targets:.1%} positive" if manifest.labeled else "without labels"
    print(
        f"one epoch in {seconds:.1f} s: {targets / seconds:,.0f} samples/s, {labels}, "
        f"{targets / users:.1f} targets a user and batch; {behaviors:,} behaviours stand for the {windows:,} "
        f"that a row for each sample would hold"
    )
