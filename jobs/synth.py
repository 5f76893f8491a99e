"""``dare synth``: generated behaviours with planted structure."""

import json as json_format
import resource
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from schemas.settings import load_settings
from schemas.synth import SynthSettings


def synth(
    out: Annotated[Path, typer.Option(help="File to write: .parquet, or .csv as Taobao's UserBehavior.csv.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, e.g. events=1000000.")
    ] = None,
    impressions: Annotated[Path | None, typer.Option(help=".parquet file to write impressions with labels to.")] = None,
    config: Annotated[list[Path] | None, typer.Option(help="YAML file of settings; repeatable.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="End standard output with one JSON object.")] = False,
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
        print(f"{impressions}: {report.impressions:,} impressions; AUC of the true chances {report.bayes_auc:.4f}")
    if json:
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json_format.dumps(asdict(report) | {"peak_mib": round(peak_mib, 1)}))
