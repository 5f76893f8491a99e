"""`dare prepare`: logs of events to a data set of user-history shards."""

import json as json_format
import resource
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from schemas.manifest import Manifest
from schemas.prepare import PRESETS, PrepareSettings
from schemas.settings import load_settings


def prepare(
    out: Annotated[Path, typer.Option(help="Folder of the data set; appears when it is whole.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, e.g. split.negatives=4.")
    ] = None,
    preset: Annotated[str, typer.Option(help=f"Settings of a known log: {', '.join(PRESETS)}.")] = "generic",
    config: Annotated[list[Path] | None, typer.Option(help="YAML file of settings; repeatable.")] = None,
    events: Annotated[list[str] | None, typer.Option(help="File or glob of behaviours; repeatable.")] = None,
    impressions: Annotated[
        list[str] | None, typer.Option(help="File or glob of impressions with labels; repeatable.")
    ] = None,
    engine: Annotated[Literal["duckdb", "spark"] | None, typer.Option(help="What computes it.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Take the place of what is in the folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="End standard output with one JSON object.")] = False,
) -> None:
    """Turn logs of events into user-history shards."""
    from pipeline.ingest.prepare import prepare as run

    if preset not in PRESETS:
        raise ValueError(f"--preset {preset}: unknown; known are {', '.join(PRESETS)}")
    for text in overrides or []:
        if "=" not in text:
            raise ValueError(
                f"{text!r}: an override is written key=value; if it is a file: --events and --impressions take one "
                "each, so repeat the option, or give it a glob in quotes"
            )
    values: dict[str, Any] = {}
    if events:
        values["events"] = {"files": events}
    if impressions:
        values |= {"impressions": {"files": impressions}, "split": {"kind": "impressions"}}
    if engine is not None:
        values["engine"] = engine
    settings = load_settings(PrepareSettings, [PRESETS[preset], *(config or [])], overrides or [], values)
    started = time.monotonic()
    manifest = run(settings, out, overwrite=overwrite)
    for reason in manifest.skipped:
        print(f"left out: {reason}", file=sys.stderr)
    result = _result(manifest) | {
        "seconds": round(time.monotonic() - started, 2),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(
        f"{out}: "
        + ", ".join(f"{value:,} {name}" for name, value in result.items() if name not in ("seconds", "peak_mib"))
    )
    if json:
        print(json_format.dumps(result))


def _result(manifest: Manifest) -> dict[str, Any]:
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
