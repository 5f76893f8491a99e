"""The `dare` command."""

import os
import sys

import typer

from jobs.bench import bench
from jobs.compare import compare
from jobs.evaluate import evaluate
from jobs.inspect import inspect
from jobs.plan import plan
from jobs.prepare import prepare
from jobs.score import score
from jobs.stream import stream
from jobs.synth import synth
from jobs.train import train
from jobs.versions import check_versions

app = typer.Typer(
    help="Train click-through-rate models on long user histories.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (prepare, synth, inspect, stream, plan, train, evaluate, score, compare):
    app.command()(command)
app.add_typer(bench, name="bench")


def main() -> None:
    """Run a command; a user's mistake is one line on standard error and exit code 1."""
    # Threads that wait for each other sleep instead of spinning: the readers need the cores. OpenMP looks at this when
    # torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        check_versions()
        app(prog_name="dare")
    except (ValueError, OSError) as error:
        # A launcher's processes all make the same mistake.
        sys.exit(f"dare: {' '.join(str(error).split())}" if os.environ.get("RANK", "0") == "0" else 1)


if __name__ == "__main__":
    main()
