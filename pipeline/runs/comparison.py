"""Finished runs side by side."""

from pathlib import Path
from typing import Any

from pipeline.paths import location
from pipeline.runs.run_folder import RunFolder
from schemas.errors import UserError
from schemas.train import flat

METRICS = {"auc": "AUC", "gauc": "GAUC", "log_loss": "log loss"}
"""Metrics of a test that runs are compared by, and what people call them."""


def compare(folders: list[Path]) -> list[dict[str, Any]]:
    """Return for each run its folder, model, data set, test metrics, and those settings in which the runs differ.

    Args:
        folders: folders of finished runs.

    Returns:
        For each run ``run``, ``model``, ``data`` (the ``folder`` of its data set and the ``fingerprint`` that it had),
        the `METRICS`, ``source`` (folder of the run on whose checkpoint it has begun, or None), and ``settings``:
        values by dotted key, None where a run has no such setting.

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
        test, data = run.test(), run.data_record()
        known = {"folder": data["folder"], "fingerprint": data["fingerprint"]}
        row = {"run": str(folder), "model": settings[-1]["model.name"], "data": known}
        rows.append(row | {name: test[name] for name in METRICS} | {"source": (run.source() or {}).get("run")})
    # All keys of all runs, in the order of the settings; the model has a column of its own.
    keys = dict.fromkeys(key for values in settings for key in values if key != "model.name")
    # By their text, because a list cannot be in a set.
    differing = [key for key in keys if len({repr(values.get(key)) for values in settings}) > 1]
    return [
        row | {"settings": {key: values.get(key) for key in differing}}
        for row, values in zip(rows, settings, strict=True)
    ]


def data_names(rows: list[dict[str, Any]]) -> list[str]:
    """Return a name of each run's data set where they differ, one for each of what `compare` returns, else nothing."""
    prints = [str(row["data"]["fingerprint"]) for row in rows]
    if len(set(prints)) == 1:
        return []
    names = distinct_names([location(str(row["data"]["folder"])) for row in rows])
    # A folder that was prepared anew is another data set: part of the fingerprint tells them apart.
    twice = {
        name for name in names if len({each for each, other in zip(prints, names, strict=True) if other == name}) > 1
    }
    return [f"{name} ({each[:12]})" if name in twice else name for name, each in zip(names, prints, strict=True)]


def distinct_names(folders: list[Path]) -> list[str]:
    """Return the last names of the folders, with as many names before them as it takes to tell the folders apart."""
    parts = [folder.absolute().parts for folder in folders]
    # As short as tells them apart: ``a/run`` and ``b/run``, but ``run-1`` and ``run-2``.
    length = 1
    while len({names[-length:] for names in parts}) < len(set(parts)):
        length += 1
    return ["/".join(names[-length:]) for names in parts]
