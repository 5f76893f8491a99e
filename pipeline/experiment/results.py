"""What is known of each cell, as a row of `results.parquet`, and whether it reaches the accuracy that is expected."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.experiment.cells import Cell, Parameters
from pipeline.files import whole_file, write_whole
from pipeline.runs.run_folder import read_step_log
from schemas.documents import json_document, read_json
from schemas.errors import UserError
from schemas.experiment import AccuracyFloor
from schemas.settings import load_settings

State = Literal["finished", "failed", "unfinished"]

Column = tuple[str, int]
"""Data set and dim: a column of the report's tables."""

SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string(), nullable=False) for name in ("data", "label", "model")),
        *(pa.field(name, pa.int64(), nullable=False) for name in ("dim", "seed")),
        pa.field("state", pa.string(), nullable=False),
        *(pa.field(name, pa.float64()) for name in ("auc", "gauc", "log_loss", "validation_auc")),
        *(pa.field(name, pa.int64()) for name in ("steps", "best_step", "best_epoch")),
        *(pa.field(name, pa.float64()) for name in ("samples_per_s", "wall_s")),
        pa.field("peak_bytes", pa.int64()),
        *(pa.field(name, pa.int64(), nullable=False) for name in ("table_parameters", "dense_parameters")),
        pa.field("revision", pa.string()),
        pa.field("error", pa.string()),
        pa.field("run", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Result:
    """A row of `results.parquet`: what is known of a cell. None: not known, or not defined."""

    data: str
    label: str
    model: str
    dim: int
    seed: int
    state: State
    auc: float | None
    """AUC of the test."""
    gauc: float | None
    """GAUC of the test."""
    log_loss: float | None
    """Log loss of the test."""
    validation_auc: float | None
    """The best AUC of a validation."""
    steps: int | None
    """Steps of the whole training."""
    best_step: int | None
    """Step of the checkpoint that was tested."""
    best_epoch: int | None
    """Epoch of that step, counted from 1."""
    samples_per_s: float | None
    """Speed of training alone, since the last start."""
    wall_s: float | None
    """Seconds of all starts that ended, each from start to end: training, validation, test and predictions."""
    peak_bytes: int | None
    """Most resident memory of the process."""
    table_parameters: int
    dense_parameters: int
    revision: str | None
    """Revision of the program that trained it last, with a + where files differed; None: not run from a checkout."""
    error: str | None
    run: str
    """Folder of the run, relative to the experiment's."""


def result_of(cell: Cell, parameters: Parameters, out: Path) -> Result:
    """Read what the files of a cell say.

    Args:
        cell: finished, failed or not begun.
        parameters: of its model.
        out: folder of the experiment.

    Raises:
        UserError: a file is damaged.
    """
    record = _record(cell)
    test = cell.run.test() if cell.finished else {}
    progress = cell.run.progress() or {}
    # None is an AUC that is not defined: a validation of one label.
    validated = [line["auc"] for line in read_step_log(cell.run.validations) if line.get("auc") is not None]
    # What a run says while it goes (speed, validations) counts only once it is finished: before, it may still change.
    steps, best = test.get("steps"), test.get("checkpoint_step")
    return Result(
        data=cell.data,
        label=cell.label,
        model=cell.settings.model.name,
        dim=cell.dim,
        seed=cell.seed,
        state="finished" if test else "failed" if record.get("error") else "unfinished",
        auc=test.get("auc"),
        gauc=test.get("gauc"),
        log_loss=test.get("log_loss"),
        validation_auc=max(validated, default=None) if test else None,
        steps=steps,
        best_step=best,
        best_epoch=math.ceil(best * cell.settings.epochs / steps) if best and steps else None,
        samples_per_s=progress.get("samples_per_s") if test else None,
        wall_s=record.get("wall_s"),
        peak_bytes=record.get("peak_bytes"),
        table_parameters=parameters.tables,
        dense_parameters=parameters.dense,
        revision=_revision(cell),
        error=None if test else record.get("error"),
        run=str(cell.folder.relative_to(out)),
    )


def _revision(cell: Cell) -> str | None:
    starts = cell.run.starts()
    git = starts[-1].get("git") if starts else None
    return git["revision"][:12] + "+" * git["modified"] if git else None


def _record(cell: Cell) -> dict[str, Any]:
    if not os.path.lexists(cell.record):
        return {}
    keys = {"wall_s": float | int, "peak_bytes": int, "error": str | None}
    return read_json(cell.record, keys, "remove it, and the cell's seconds and memory are counted anew")


def add_to_record(cell: Cell, seconds: float, peak_bytes: int, error: str | None) -> None:
    """Note in the record of a cell that a start of it has ended.

    Args:
        cell: of the experiment.
        seconds: of this start; the record adds up those of all starts.
        peak_bytes: most resident memory of this start; the record keeps the most of all starts.
        error: why it failed; None: it did not fail.
    """
    before = _record(cell)
    record = {
        "wall_s": round(before.get("wall_s", 0.0) + seconds, 2),
        "peak_bytes": max(before.get("peak_bytes", 0), peak_bytes),
        "error": error,
    }
    write_whole(cell.record, json_document(json.dumps(record) + "\n"))


def seconds_of(cell: Cell) -> float | None:
    """Seconds of all starts of a cell that have ended; None: none has."""
    return _record(cell).get("wall_s")


def write_results(results: Sequence[Result], file: Path) -> None:
    """Write results as a Parquet file, which is there with all its content or as it was before.

    Raises:
        OSError: it cannot be written.
    """
    with whole_file(file) as unfinished:
        pq.write_table(pa.Table.from_pylist([asdict(result) for result in results], schema=SCHEMA), unfinished)


def grouped(results: Sequence[Result]) -> dict[tuple[str, Column], list[Result]]:
    """Finished cells by label and column; each group has one result a seed. Cells without an AUC are left out."""
    groups: dict[tuple[str, Column], list[Result]] = {}
    for result in results:
        if result.auc is not None:
            groups.setdefault((result.label, (result.data, result.dim)), []).append(result)
    return groups


def read_floor(file: Path, experiment: str) -> AccuracyFloor:
    """Read the accuracy that is expected of an experiment, such as `benchmarks/accuracy.json`.

    Args:
        file: JSON or YAML of an `AccuracyFloor`.
        experiment: name that the file must have.

    Raises:
        UserError: the file is not there, is something else, or is of another experiment.
    """
    try:
        floor = load_settings(AccuracyFloor, [file])
    except UserError as error:
        raise UserError(f"{file}: {error}" if str(file) not in str(error) else str(error)) from None
    if floor.experiment != experiment:
        raise UserError(f"{file}: is of the experiment {floor.experiment}, not of {experiment}")
    return floor


def below(floor: AccuracyFloor, results: Sequence[Result]) -> list[str]:
    """What is lower than expected, has no result, or is not in the file; a line each."""
    cells = grouped(results)
    faults = []
    for data, by_dim in floor.floors.items():
        for dim, by_label in by_dim.items():
            for label, expected in by_label.items():
                group = cells.get((label, (data, dim)))
                if group is None:
                    faults.append(f"{label} on {data}, d {dim}: no result, {expected.auc:.4f} expected")
                    continue
                # The mean over the seeds that are there: a floor is checked with fewer seeds too.
                auc = fmean(cell.auc for cell in group if cell.auc is not None)
                if auc < expected.auc - expected.tolerance:
                    faults.append(
                        f"{label} on {data}, d {dim}: AUC {auc:.4f}, {expected.auc:.4f} expected "
                        f"with a tolerance of {expected.tolerance:g}"
                    )
    # And the other way round: a result that nobody expects would never be checked.
    known = {(label, (data, dim)) for data, dims in floor.floors.items() for dim, of in dims.items() for label in of}
    faults += [
        f"{label} on {data}, d {dim}: not in the file"
        for label, (data, dim) in cells
        if (label, (data, dim)) not in known
    ]
    return faults
