"""All commands of `dare` by name. Loading them takes a moment, in which `jobs.cli` already tells an interrupt."""

from collections.abc import Callable
from functools import wraps
from importlib.metadata import entry_points
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from jobs.data import inspect, prepare, stream, synth
from jobs.experiment import experiment
from jobs.export import export
from jobs.online import online
from jobs.planning import plan
from jobs.runs import compare, models, runs
from jobs.serve import serve
from jobs.store import append, load, show
from jobs.training import evaluate, score, train
from pipeline.paths import local_path, location
from pipeline.versions import versions

REMOTE: dict[Callable[..., None], set[str]] = {
    prepare: {"out", "extend", "dictionaries"},
    inspect: {"folder"},
    stream: {"folder"},
    plan: {"data"},
    train: {"data", "run", "score"},
    evaluate: {"data", "run"},
    score: {"data", "run", "out"},
    export: {"data", "run"},
    compare: {"runs"},
    runs: {"folder"},
    load: {"data"},
}
"""Parameters of commands that take URLs, beside those whose values are texts."""


_TEXT: dict[Any, Any] = {Path: str, Path | None: str | None, list[Path]: list[str]}


def on_paths(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the paths that its arguments name.

    URLs are refused where it takes none: they would become local folders of such names.
    """
    remote = REMOTE.get(command, set())

    @wraps(command)
    def checked(**arguments: Any) -> None:
        for name, value in arguments.items():
            # A `Path` of a URL has lost slashes: where URLs may come, texts do.
            kind, path = (str, location) if name in remote else (Path, local_path)
            if isinstance(value, kind):
                arguments[name] = path(str(value))
            elif isinstance(value, list):
                arguments[name] = [path(str(each)) if isinstance(each, kind) else each for each in value]
        command(**arguments)

    parameters = []
    for parameter in signature(command).parameters.values():
        if parameter.name in remote:
            path_type, info = get_args(parameter.annotation)
            info.metavar = info.metavar or "PATH"
            parameter = parameter.replace(annotation=Annotated[_TEXT[path_type], info])
        parameters.append(parameter)
    checked.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": None}
    checked.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return checked


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (
    prepare,
    synth,
    inspect,
    stream,
    plan,
    train,
    online,
    evaluate,
    score,
    export,
    serve,
    compare,
    experiment,
    runs,
    models,
):
    app.command()(on_paths(command))
store = typer.Typer(no_args_is_help=True, help="Keep the histories of users: load a log, append events, show a user.")
for of_store in (load, append, show):
    store.command()(on_paths(of_store))
app.add_typer(store, name="store")
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
