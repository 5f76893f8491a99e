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

from pipeline.errors import printable
from pipeline.paths import location
from schemas.errors import StoppedError, UserError

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

    from jobs.device import gpus
    from pipeline.experiment.cells import cells_of, check_names, parameters_of, refuse_changed
    from pipeline.experiment.data_sets import check_sources, open_data_sets
    from pipeline.experiment.folder import Documents, held, write_settings
    from pipeline.experiment.results import below, read_floor
    from pipeline.experiment.runner import CellProgress, run_cells

    # Everything that can be refused is looked at before the folder is made, and what needs the data sets before any
    # cell runs.
    out, dare = out.absolute(), [sys.executable, "-m", "jobs.cli"]
    floor = read_floor(check, settings.name) if check else None
    cells = cells_of(settings, recipe, out)
    check_names(cells)
    check_sources(settings.data, given)
    count = gpus(os.environ)
    with held(out, settings):
        data_sets = open_data_sets(settings.data, given, out, dare)
        manifests = {name: data_set.manifest for name, data_set in data_sets.items()}
        # Every model is built once on the meta device: none turns out to be impossible after hours of others.
        parameters = parameters_of(cells, manifests, "cuda" if count else "cpu")
        refuse_changed(cells, {name: data_set.fingerprint for name, data_set in data_sets.items()})
        write_settings(out, settings)
        documents = Documents(out, settings, cells, parameters, shlex.join(["dare", *sys.argv[1:]]))
        folders = {name: data_set.folder.absolute() for name, data_set in data_sets.items()}
        slots = _slots(parallel, count)
        with CellProgress(cells, len(slots)) as progress:
            complete = run_cells(cells, folders, dare, slots, documents.cell_ended, progress)
        results, pairs = documents.write()
    _print(settings, results)
    print(f"{printable(out / 'report.html')}: the report; report.md and results.parquet are beside it")
    if json:
        document = {"cells": [asdict(result) for result in results], "pairs": [asdict(pair) for pair in pairs]}
        print(json_format.dumps(document))
    _end(results, complete, below(floor, results) if floor else [])


def load_experiment(file: str) -> "tuple[ExperimentSettings, Path | None]":
    """Read the settings of an experiment.

    Args:
        file: path of a settings file, or the name of a shipped experiment.

    Returns:
        The settings, and the file of the recipe that all runs share, if they name one.

    Raises:
        UserError: a file is not there, or its settings are impossible.
    """
    from schemas.experiment import ExperimentSettings
    from schemas.settings import load_settings

    path = SHIPPED.get(file, Path(file))
    if not path.is_file():
        raise UserError(f"{file}: no such settings file, and not a shipped experiment; those are {', '.join(SHIPPED)}")
    try:
        settings = load_settings(ExperimentSettings, _extended(path))
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    if settings.recipe is None:
        return settings, None
    recipe = RECIPES.get(settings.recipe, path.parent / settings.recipe)
    if not recipe.is_file():
        raise UserError(f"{file}: recipe: {recipe} is not there; shipped are {', '.join(RECIPES)}")
    return settings, recipe


def _extended(file: Path, below: tuple[Path, ...] = ()) -> list[Path]:
    """The files that make up ``file``: those that it extends, each behind those that it extends itself, and ``file``.

    ``below`` are the files that lead to it, none of which it may extend.
    """
    import yaml

    if file.resolve() in below:
        raise UserError(f"extends: {file} extends itself, at once or by way of others")
    if not file.is_file():
        return [file]  # what reads it says so
    try:
        with file.open() as stream:  # A stream: YAML's errors name its file.
            content = yaml.safe_load(stream)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {' '.join(str(error).split())}") from None
    bases = content.get("extends", []) if isinstance(content, dict) else []
    if not isinstance(bases, list):
        raise UserError(f"extends: a list of files is wanted, not {bases!r}, in {file}")
    extended = [_extended(file.parent / str(base), (*below, file.resolve())) for base in bases]
    return [*(each for files in extended for each in files), file]


def _folders(texts: Sequence[str]) -> dict[str, Path]:
    folders = {}
    for text in texts:
        name, given, folder = text.partition("=")
        if not (name and given and folder):
            raise UserError(f"--data {text}: is written NAME=FOLDER")
        folders[name] = location(folder).absolute()
    return folders


def _slots(parallel: int | None, gpus: int) -> list[Mapping[str, str]]:
    """The environment of each of the runs that may run at the same time; with GPUs, one GPU each, in turn."""
    if not gpus:
        # The cores that this process may use, which on a shared machine are fewer than there are.
        return [{}] * (parallel or len(os.sched_getaffinity(0)))
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    # By the names that this process was given: a scheduler may have left it only some of the GPUs.
    return [{"CUDA_VISIBLE_DEVICES": names[slot % gpus]} for slot in range(parallel or gpus)]


def _print(settings: "ExperimentSettings", results: "Sequence[Result]") -> None:
    """The first table of the report."""
    from pipeline.experiment.report import all_tables
    from pipeline.reporting.text_table import table_lines, terminal_width

    section = all_tables(settings, results, [])[0]
    assert section.table is not None
    # As everywhere, an empty cell is no value; a star is the bold of the page.
    rows = [[entry.text + "*" * entry.bold for entry in row] for row in section.table.rows]
    note = "; *: the best of a column" if any(entry.bold for row in section.table.rows for entry in row) else ""
    print(f"{settings.name}: {section.title}{note}")
    print("\n".join(table_lines(section.table.header, rows, width=terminal_width())))


def _end(results: "Sequence[Result]", complete: bool, faults: Sequence[str]) -> None:
    """Raise a `UserError` where the experiment was stopped, a cell has failed, or accuracy is below the floor."""
    finished = sum(result.state == "finished" for result in results)
    if not complete:
        raise StoppedError(f"stopped, {finished} of {len(results)} cells are finished; the same command goes on")
    failed = [result for result in results if result.state == "failed"]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(results)} cells failed, the first in {failed[0].run}: {failed[0].error}"
        )
    if faults:
        raise UserError(f"accuracy: {'; '.join(faults)}")
