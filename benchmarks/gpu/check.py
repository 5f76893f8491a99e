"""Checks the program on a GPU in steps: `python -m benchmarks.gpu.check`, or `make check-gpu`.

Each step is a process with a time limit of its own. A step that fails, hangs or breaks the GPU's context costs no other
step. After each step all that is known is in check-gpu.json; at the end it is one table. This file needs Python alone.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.gpu.figures import Figure

KERNEL, TRAINING = "benchmarks.gpu.kernel", "benchmarks.gpu.training"


@dataclass(frozen=True)
class Step:
    """One process of the check."""

    name: str
    module: str
    seconds: float
    """Its limit."""
    interpreted: bool = False
    """On a machine without a GPU, Triton's interpreter does it."""


STEPS = (
    # A: torch and triton alone.
    Step("versions", KERNEL, 60, interpreted=True),
    Step("compile", KERNEL, 120),
    Step("correct", KERNEL, 120, interpreted=True),
    Step("bandwidth", KERNEL, 60),
    Step("against-torch", KERNEL, 60),
    Step("pairs", KERNEL, 60),
    Step("short-windows", KERNEL, 30),
    # B: with fbgemm and torchrec. What is most likely to fail comes first.
    Step("bucketing", TRAINING, 40),
    Step("losses-dare", TRAINING, 120),
    Step("losses-twin", TRAINING, 120),
    Step("throughput", TRAINING, 180),
    Step("synchronisations", TRAINING, 60),
    Step("resume", TRAINING, 60),
    Step("half-precision", TRAINING, 60),
    Step("host-memory", TRAINING, 60),
    # Slow, and no other step needs it.
    Step("sanitizer", KERNEL, 120),
)


@dataclass
class Outcome:
    """What became of a step."""

    step: str
    state: Literal["done", "failed", "out of time", "left out"]
    seconds: float = 0.0
    reason: str = ""
    figures: list[Figure] = field(default_factory=list)


def main() -> int:
    """Run the steps; returns 1 if one failed or ran out of time, or a goal is missed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="of all steps; what it is too short for is left out")
    parser.add_argument("--out", type=Path, default=Path("check-gpu.json"), help="where the results are written")
    parser.add_argument("--only", nargs="*", choices=[step.name for step in STEPS], help="these steps alone")
    arguments = parser.parse_args()
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("triton") is None:
        print(f"{sys.executable} has no torch or no triton; PYTHON=/path/to/python make check-gpu", file=sys.stderr)
        return 1
    gpu = _finds_gpu()
    fbgemm = all(importlib.util.find_spec(name) is not None for name in ("fbgemm_gpu", "torchrec"))
    until, outcomes = time.monotonic() + arguments.seconds, []
    for step in STEPS:
        if arguments.only is not None and step.name not in arguments.only:
            continue
        outcome = _left_out(step, gpu, fbgemm, until) or _run(step, gpu, min(step.seconds, until - time.monotonic()))
        print(f"{step.name}: {outcome.state} {outcome.reason}", file=sys.stderr, flush=True)
        outcomes.append(outcome)
        _write(outcomes, arguments.out)
    print(_table(outcomes))
    sound = all(outcome.state in ("done", "left out") for outcome in outcomes)
    return 0 if sound and all(figure.met is not False for outcome in outcomes for figure in outcome.figures) else 1


def _finds_gpu() -> bool:
    command = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def _left_out(step: Step, gpu: bool, fbgemm: bool, until: float) -> Outcome | None:
    if not gpu and not step.interpreted:
        return Outcome(step.name, "left out", reason="needs a GPU")
    if step.module == TRAINING and not fbgemm:
        return Outcome(step.name, "left out", reason="needs fbgemm_gpu and torchrec")
    # In less a process does not even load torch.
    if time.monotonic() > until - 10:
        return Outcome(step.name, "left out", reason="no time is left")
    return None


def _run(step: Step, gpu: bool, seconds: float) -> Outcome:
    environment = dict(os.environ) if gpu else {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", step.module, step.name]
    began = time.monotonic()
    # A session of its own, so that the limit ends what the step has started, too.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        out, errors = process.communicate(timeout=seconds)
        state: Literal["done", "failed", "out of time"] = "failed" if process.returncode else "done"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, errors = process.communicate()
        state = "out of time"
    lines = errors.strip().splitlines()
    if state != "done":
        print("\n".join(lines[-30:]), file=sys.stderr)
    reason = {"done": "", "failed": lines[-1] if lines else f"exit code {process.returncode}"}.get(
        state, f"after {seconds:.0f} s"
    )
    figures = [figure for line in out.splitlines() if (figure := Figure.from_line(line)) is not None]
    return Outcome(step.name, state, round(time.monotonic() - began, 1), reason, figures)


def _write(outcomes: list[Outcome], path: Path) -> None:
    document = [
        {**asdict(outcome), "figures": [{**asdict(figure), "met": figure.met} for figure in outcome.figures]}
        for outcome in outcomes
    ]
    # Whole or not at all: the machine may be taken away at any moment.
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document, indent=2) + "\n")
    partial.replace(path)


def _table(outcomes: list[Outcome]) -> str:
    rows = [("step", "state", "figure", "value", "goal", "")]
    for outcome in outcomes:
        head = f"{outcome.state}, {outcome.seconds:.0f} s" if outcome.seconds else outcome.state
        rows.append((outcome.step, head, outcome.reason, "", "", ""))
        for figure in outcome.figures:
            value = figure.value if isinstance(figure.value, str) else f"{figure.value:,.6g}"
            met = {None: "", True: "met", False: "MISSED"}[figure.met]
            rows.append(("", "", figure.name, f"{value} {figure.unit}".strip(), figure.goal, met))
    widths = [min(60, max(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


if __name__ == "__main__":
    sys.exit(main())
