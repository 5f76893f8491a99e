"""The `dare` command."""

import os
import sys
from typing import Annotated

import typer

from benchmarks.cli import bench
from jobs.data import inspect, prepare, stream, synth
from jobs.experiment import experiment
from jobs.planning import plan
from jobs.runs import compare, models, runs
from jobs.training import evaluate, score, train
from jobs.versions import check_versions
from pipeline.versions import versions

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (prepare, synth, inspect, stream, plan, train, evaluate, score, compare, experiment, runs, models):
    app.command()(command)
app.add_typer(bench, name="bench")


def show_versions(wanted: bool) -> None:
    """Print what is installed, and end."""
    if wanted:
        print("\n".join(f"{package} {version}" for package, version in versions().items()))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Versions of this program and of what it runs on.", callback=show_versions)
    ] = False,
) -> None:
    """Train click-through-rate models on long user histories."""


def main() -> None:
    """Run a command; a user's mistake is one line on standard error and exit code 1."""
    # Threads that wait for each other sleep instead of spinning: the readers need the cores. OpenMP looks at this when
    # torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        check_versions()
        app(prog_name="dare")
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("dare: interrupted", file=sys.stderr)
        raise
    except (ValueError, OSError) as error:
        # A launcher's processes all make the same mistake.
        sys.exit(f"dare: {' '.join(str(error).split())}" if os.environ.get("RANK", "0") == "0" else 1)


if __name__ == "__main__":
    main()
