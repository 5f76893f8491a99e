"""`dare experiment`: models x dims x seeds x data sets, one table."""

import json as json_format
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from schemas.errors import UserError

if TYPE_CHECKING:
    from pipeline.experiment.results import Result
    from schemas.experiment import ExperimentSettings

SHIPPED = {file.stem: file for file in sorted(Path(__file__).with_name("experiments").glob("*.yaml"))}
RECIPES = {file.stem: file for file in sorted(Path(__file__).with_name("recipes").glob("*.yaml"))}


def experiment(
    file: Annotated[str, typer.Argument(help=f"Settings file, or a shipped experiment: {', '.join(SHIPPED)}.")],
    out: Annotated[Path, typer.Option(help="Folder of the experiment; what is finished in it is not run again.")],
    data: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="Where a data set is; repeatable.")
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="Runs at the same time; if not given, one a GPU, or else one a core.")
    ] = None,
    check: Annotated[Path | None, typer.Option(help="File of the accuracy that must be reached.")] = None,
    json: Annotated[bool, typer.Option("--json", help="End standard output with one JSON object.")] = False,
) -> None:
    """Train every model of an experiment with every dim and seed, and compare them."""
    settings, recipe = load_experiment(file)
    given = _folders(data or [])

    from pipeline.experiment.cells import cells_of, check_names, parameters_of, refuse_changed
    from pipeline.experiment.data_sets import check_sources, opened
    from pipeline.experiment.floor import below, read_floor
    from pipeline.experiment.folder import Documents, held, write_settings
    from pipeline.experiment.progress import Progress
    from pipeline.experiment.runner import run_cells

    out, dare = out.absolute(), [sys.executable, "-m", "jobs.cli"]
    floor = read_floor(check, settings.name) if check else None
    cells = cells_of(settings, recipe, out)
    check_names(cells)
    check_sources(settings.data, given)
    with held(out, settings):
        sets = opened(settings.data, given, out, dare)
        gpus = _gpus()
        manifests = {name: found.manifest for name, found in sets.items()}
        parameters = parameters_of(cells, manifests, "cuda" if gpus else "cpu")
        refuse_changed(cells, {name: found.fingerprint for name, found in sets.items()})
        write_settings(out, settings)
        documents = Documents(out, settings, cells, parameters, shlex.join(["dare", *sys.argv[1:]]))
        folders = {name: found.folder.absolute() for name, found in sets.items()}
        slots = _slots(parallel, gpus)
        with Progress(cells, len(slots)) as progress:
            complete = run_cells(cells, folders, dare, slots, documents.cell_ended, progress)
        results, pairs = documents.write()
    _print(settings, results)
    print(f"{out / 'report.html'}: the report; report.md and results.parquet are beside it")
    if json:
        document = {"cells": [asdict(result) for result in results], "pairs": [asdict(pair) for pair in pairs]}
        print(json_format.dumps(document))
    _end(results, complete, below(floor, results) if floor else [])


def load_experiment(file: str) -> "tuple[ExperimentSettings, Path | None]":
    """Settings of an experiment, and the file of its recipe if it has one.

    Args:
        file: path, or name of a shipped one.

    Raises:
        UserError: it is not there, or impossible.
    """
    from schemas.experiment import ExperimentSettings
    from schemas.settings import load_settings

    path = SHIPPED.get(file, Path(file))
    if not path.is_file():
        raise UserError(f"{file}: no such settings file, and not a shipped experiment; those are {', '.join(SHIPPED)}")
    try:
        settings = load_settings(ExperimentSettings, _extended(path))
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    if settings.recipe is None:
        return settings, None
    recipe = RECIPES.get(settings.recipe, path.parent / settings.recipe)
    if not recipe.is_file():
        raise UserError(f"{file}: recipe: {recipe} is not there; shipped are {', '.join(RECIPES)}")
    return settings, recipe


def _extended(file: Path, below: tuple[Path, ...] = ()) -> list[Path]:
    """The files that ``file`` extends, those that they extend first, and itself; ``below`` are being laid over it."""
    import yaml

    if file.resolve() in below:
        raise UserError(f"extends: {file} extends itself, at once or by way of others")
    if not file.is_file():
        return [file]  # what reads it says so
    with file.open() as stream:  # a stream, so that a mistake names the file
        try:
            content = yaml.safe_load(stream)
        except yaml.YAMLError as error:
            raise UserError(f"cannot be read: {' '.join(str(error).split())}") from None
    bases = content.get("extends", []) if isinstance(content, dict) else []
    if not isinstance(bases, list):
        raise UserError(f"extends: a list of files is wanted, not {bases!r}, in {file}")
    found = [_extended(file.parent / str(base), (*below, file.resolve())) for base in bases]
    return [*(each for files in found for each in files), file]


def _folders(texts: Sequence[str]) -> dict[str, Path]:
    folders = {}
    for text in texts:
        name, given, folder = text.partition("=")
        if not (name and given and folder):
            raise UserError(f"--data {text}: is written NAME=FOLDER")
        folders[name] = Path(folder).absolute()
    return folders


def _gpus() -> int:
    import torch

    from pipeline.versions import fbgemm_has_cuda

    return torch.cuda.device_count() if fbgemm_has_cuda() else 0


def _slots(parallel: int | None, gpus: int) -> list[Mapping[str, str]]:
    """The environment of each run at a time: GPUs in turn, where there are some."""
    if not gpus:
        return [{}] * (parallel or len(os.sched_getaffinity(0)))
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    return [{"CUDA_VISIBLE_DEVICES": names[place % gpus]} for place in range(parallel or gpus)]


def _print(settings: "ExperimentSettings", results: "Sequence[Result]") -> None:
    """The first table of the report."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from pipeline.experiment.tables import all_tables

    auc = all_tables(settings, results, [])[0]
    table = Table(*auc.header, title=f"{settings.name}: {auc.title}", title_justify="left")
    for row in auc.rows:
        table.add_row(*(Text(entry.text, "bold" if entry.bold else "") for entry in row))
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def _end(results: "Sequence[Result]", complete: bool, faults: Sequence[str]) -> None:
    """Raises where not all is well."""
    finished = sum(result.state == "finished" for result in results)
    if not complete:
        raise UserError(f"stopped, {finished} of {len(results)} cells are finished; the same command goes on")
    failed = [result for result in results if result.state == "failed"]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(results)} cells failed, the first in {failed[0].run}: {failed[0].error}"
        )
    if faults:
        raise UserError(f"accuracy: {'; '.join(faults)}")
