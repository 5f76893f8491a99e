"""How the runs below a folder are doing, as their files alone say: no process is asked, none is disturbed."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.runs.checkpoint import steps_in
from pipeline.runs.run_folder import LOCK, RunFolder, read_step_log
from schemas.documents import is_named, read_json
from schemas.errors import UserError
from schemas.online import WHOLE
from schemas.storage import RemotePath

State = Literal["running", "finished", "stopped", "failed", "died", "damaged"]

_MARKS = {LOCK, "data_set.json", "job.json", "losses.jsonl"}
"""A folder with one of these is that of a run."""


@dataclass(frozen=True)
class RunState:
    """What the files of a run say about it; None where they do not."""

    run: str
    """Folder of the run."""
    state: State
    """``stopped``: it was asked to; ``failed``: it ended with an error; ``died``: it was killed, or its machine was."""
    model: str | None = None
    step: int | None = None
    """The last step that was done, as of some seconds ago if the run goes on."""
    steps: int | None = None
    """Steps in all."""
    ended_early: bool = False
    """Whether a finished run has ended before its last step, because ``validation.patience`` ran out."""
    checkpoint_step: int | None = None
    """Step of the last checkpoint, from which the same command goes on."""
    validations: int | None = None
    """Validations so far, those included in which the AUC is not defined."""
    auc_before: float | None = None
    """AUC of a day of `dare online` on all its targets, before it was learnt."""
    best_validation_auc: float | None = None
    test_auc: float | None = None
    samples_per_s: float | None = None
    """Samples a second of all ranks together since the last start, validations left out."""
    starts: int | None = None
    started: str | None = None
    """Time of the last start, UTC."""
    app: str | None = None
    """Handle of the torchx job that has started it last."""
    source: str | None = None
    """Folder of the run on whose checkpoint it has begun."""
    error: str | None = None
    """Why it failed, or what is damaged."""


def find_runs(folder: Path) -> list[Path]:
    """Return the folders of runs in ``folder``, at any depth, by name.

    Raises:
        UserError: no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if isinstance(folder, RemotePath):
        marked = {file.parent for file in folder.files() if file.name in _MARKS}
        return sorted(run for run in marked if not any(part[0] == "." for part in run.relative_to(folder).parts))
    runs = list[Path]()
    # A folder that may not be read might be a run: it is listed as a damaged one.
    for path, folders, files in os.walk(folder, onerror=lambda error: runs.append(Path(error.filename))):
        if _MARKS & set(files):
            runs.append(Path(path))
            folders.clear()  # a run has no runs in it, but many folders
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    return runs


def run_state(folder: Path) -> RunState:
    """Say how the run in ``folder`` is doing. A running one is not disturbed; a damaged one is called so."""
    run = RunFolder(folder)
    try:
        # Before all else is read: a run that ends meanwhile has then written everything.
        running = run.is_locked()
        return _read(run, running)
    except (ValueError, OSError) as error:
        return RunState(str(folder), "damaged", error=" ".join(str(error).split()))
    except (LookupError, TypeError, AttributeError):
        return RunState(str(folder), "damaged", error="its files hold other values than a run writes")


def _read(run: RunFolder, running: bool) -> RunState:
    if not run.settings_file.is_file() and (running or [path.name for path in run.path.iterdir()] == [LOCK]):
        # Killed before it had written anything: there is nothing to go on from, and nothing is lost.
        return RunState(str(run.path), "running" if running else "died")
    # While the run goes on each file is whole, but one may be older than another.
    progress = run.progress() or {}
    test = run.test() if is_named(run.test_file) else {}
    starts = run.starts()
    last = starts[-1] if starts else {}
    validations = _validation_aucs(run)
    # The lock counts first, then the test: until a new start is recorded, job.json tells how the one before it ended,
    # and a run that was killed right after its test is finished.
    state: State = "running" if running else "finished" if test else last.get("how", "died")
    # The progress file is some seconds old, and a checkpoint may be newer.
    checkpoint_step = max((int(path.name[5:]) for path in steps_in(run.checkpoints)), default=None)
    steps_done = [step for step in (progress.get("step"), checkpoint_step) if step is not None]
    return RunState(
        run=str(run.path),
        state=state,
        model=run.settings().model.name,
        step=max(steps_done, default=None),
        steps=progress.get("steps"),
        ended_early=bool(test.get("ended_early")),
        checkpoint_step=checkpoint_step,
        validations=len(validations),
        auc_before=_auc_before(run),
        best_validation_auc=max((auc for auc in validations if auc is not None), default=None),
        test_auc=test.get("auc"),
        samples_per_s=progress.get("samples_per_s") or None,
        starts=len(starts) or None,
        started=last.get("time"),
        app=last.get("app"),
        source=(run.source() or {}).get("run"),
        error=last.get("error") if state == "failed" else None,
    )


def _auc_before(run: RunFolder) -> float | None:
    """Return the main task's AUC on a whole day before it was learnt; None: none was measured, or it is undefined."""
    if not is_named(run.before_file):
        return None
    tasks = read_json(run.before_file, {"tasks": dict | None})["tasks"]
    if not tasks:
        return None
    auc: float | None = next(iter(tasks.values()))[WHOLE]["auc"]
    return auc


def _validation_aucs(run: RunFolder) -> list[float | None]:
    """Return the AUC of each validation; None where it is not defined."""
    lines = read_step_log(run.validations)
    if not all("auc" in line for line in lines):
        raise UserError(f"{run.validations} is damaged (a line without auc)")
    return [line["auc"] for line in lines]
