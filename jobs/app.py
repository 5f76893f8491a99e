"""All commands of `dare` by name. Loading them takes a moment, in which `jobs.cli` already tells an interrupt."""

from collections.abc import Callable
from functools import wraps
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.data import inspect, prepare, stream, synth
from jobs.experiment import experiment
from jobs.planning import plan
from jobs.runs import compare, models, runs
from jobs.training import evaluate, score, train
from pipeline.paths import local_path
from pipeline.versions import versions


def on_local_paths(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command refuse URLs where it takes paths: they would become local folders of such names."""

    @wraps(command)
    def checked(**arguments: Any) -> None:
        for name, value in arguments.items():
            if isinstance(value, Path):
                arguments[name] = local_path(str(value))
            elif isinstance(value, list):
                arguments[name] = [local_path(str(each)) if isinstance(each, Path) else each for each in value]
        command(**arguments)

    return checked


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (prepare, synth, inspect, stream, plan, train, evaluate, score, compare, experiment, runs, models):
    app.command()(on_local_paths(command))
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
