"""The `dare` command: all commands by name, and the edge at which errors become lines and exit codes."""

import os
import sys
from importlib.metadata import entry_points
from typing import Annotated

import typer

from jobs.data import inspect, prepare, stream, synth
from jobs.experiment import experiment
from jobs.planning import plan
from jobs.runs import compare, models, runs
from jobs.training import evaluate, score, train
from pipeline.errors import INTERRUPTED, error_line, show_trace, tell
from pipeline.progress import first_rank, log_to_standard_error
from pipeline.versions import check_versions, versions

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (prepare, synth, inspect, stream, plan, train, evaluate, score, compare, experiment, runs, models):
    app.command()(command)
# Extensions declare a `typer.Typer` in this group. It is loaded at once, because the help lists it: its module must be
# light, and load what its commands need when they are called.
for extension in sorted(entry_points(group="dare.commands"), key=lambda point: point.name):
    app.add_typer(extension.load(), name=extension.name)


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
    """Run a command.

    A user's mistake is one line on standard error and exit code 1, a fault of the program its trace and exit code 70;
    see `pipeline.errors`.
    """
    # Threads that wait for each other sleep instead of spinning: the readers need the cores. OpenMP looks at this when
    # torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    log_to_standard_error()
    try:
        # First: with packages that do not fit, the imports behind a command would crash in a library.
        check_versions()
        app(prog_name="dare")
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer has turned Ctrl-C into it
            print("dare: interrupted", file=sys.stderr)
        raise
    except (Exception, KeyboardInterrupt) as error:
        line = error_line(error)
        if line is None or isinstance(error, KeyboardInterrupt):
            sys.exit(tell(error))
        if not first_rank():  # a launcher's processes all make the same mistake
            sys.exit(1)
        show_trace(error, fault=False)
        sys.exit(f"dare: {line}")


if __name__ == "__main__":
    main()
