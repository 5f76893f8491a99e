"""`dare bench plan`: estimated training steps beside measured ones."""

import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def bench_plan(
    topology: Annotated[
        Path | None,
        typer.Option(help="File that `dare plan --calibrate` wrote a moment ago; without it, measure anew."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> None:
    """Compare the steps that `dare plan` estimates with steps of two processes on this machine."""
    from benchmarks.calibration import calibrated  # Loads torch, which takes a while.
    from benchmarks.plan import measure
    from schemas.cluster import ClusterSettings
    from schemas.settings import load_settings

    cluster = load_settings(ClusterSettings, [topology]) if topology else calibrated()
    print(f"{cluster.device_name}; {cluster.measured}")
    print(f"{'search':8}{'targets':>8}{'N':>7}{'dim':>5}{'K':>4}{'estimated ms':>14}{'measured ms':>13}{'ratio':>7}")
    found = []
    for step in measure(cluster):
        found.append(step)
        print(
            f"{step.search:8}{step.targets:>8,}{step.length:>7,}{step.dim:>5}{step.retrieved:>4}"
            f"{step.estimated_ms:>14,.1f}{step.measured_ms:>13,.1f}{step.ratio:>7.2f}",
            flush=True,
        )
    worst = max(max(step.ratio, 1 / step.ratio) for step in found)
    print(f"off by a factor of {worst:.2f} at most")
    if json:
        print(json_format.dumps({"steps": [asdict(step) for step in found], "worst": round(worst, 3)}))
