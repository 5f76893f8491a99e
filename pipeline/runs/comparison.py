"""Finished runs side by side."""

from pathlib import Path
from typing import Any

from pipeline.files import read_json
from pipeline.runs.run_folder import RunFolder
from schemas.errors import UserError
from schemas.train import flat

METRICS = ("auc", "gauc", "log_loss")


def compare(folders: list[Path]) -> list[dict[str, Any]]:
    """Return for each run its folder, its model, its test metrics, and those settings in which the runs differ.

    Args:
        folders: folders of finished runs.

    Returns:
        For each run ``run``, ``model``, the `METRICS` and ``settings``: values by dotted key, None where a run has no
        such setting.

    Raises:
        UserError: one is not the folder of a run, or not finished.
    """
    rows: list[dict[str, Any]] = []
    settings = []
    for folder in folders:
        run = RunFolder(folder)
        settings.append(flat(run.settings()))
        if not run.test_file.is_file():
            raise UserError(f"{folder}: the run is not finished, it has no {run.test_file.name}; `dare train` goes on")
        test = read_json(run.test_file)
        if not set(METRICS) <= test.keys():
            raise UserError(f"{run.test_file} is damaged (no {', '.join(METRICS)})")
        rows.append({"run": str(folder), "model": settings[-1]["model.name"]} | {name: test[name] for name in METRICS})
    # All keys of all runs, in the order of the settings; the model has a column of its own.
    keys = dict.fromkeys(key for values in settings for key in values if key != "model.name")
    # By their text, because a list cannot be in a set.
    differing = [key for key in keys if len({repr(values.get(key)) for values in settings}) > 1]
    return [
        row | {"settings": {key: values.get(key) for key in differing}}
        for row, values in zip(rows, settings, strict=True)
    ]


def distinct_names(folders: list[Path]) -> list[str]:
    """Return the last names of the folders, with as many names before them as it takes to tell the folders apart."""
    parts = [folder.absolute().parts for folder in folders]
    # As short as tells them apart: ``a/run`` and ``b/run``, but ``run-1`` and ``run-2``.
    length = 1
    while len({names[-length:] for names in parts}) < len(set(parts)):
        length += 1
    return ["/".join(names[-length:]) for names in parts]
