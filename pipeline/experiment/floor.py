"""The accuracy that is expected of an experiment, kept as data: `benchmarks/accuracy.json`."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from pipeline.experiment.pairs import grouped
from pipeline.experiment.results import Result
from schemas.errors import UserError
from schemas.experiment import AccuracyFloor
from schemas.settings import load_settings


def read_floor(file: Path, experiment: str) -> AccuracyFloor:
    """Read the file.

    Raises:
        UserError: not such a file, or of another experiment.
    """
    try:
        floor = load_settings(AccuracyFloor, [file])
    except ValueError as error:
        raise UserError(f"{file}: {error}" if str(file) not in str(error) else str(error)) from None
    if floor.experiment != experiment:
        raise UserError(f"{file}: is of the experiment {floor.experiment}, not of {experiment}")
    return floor


def below(floor: AccuracyFloor, results: Sequence[Result]) -> list[str]:
    """What is lower than expected, or missing, a line each; also models that the file does not know."""
    cells = grouped(results)
    found = []
    for data, by_dim in floor.floors.items():
        for dim, by_label in by_dim.items():
            for label, expected in by_label.items():
                group = cells.get((label, (data, dim)))
                if group is None:
                    found.append(f"{label} on {data}, d {dim}: no result, {expected.auc:.4f} expected")
                    continue
                auc = fmean(cell.auc for cell in group if cell.auc is not None)
                if auc < expected.auc - expected.tolerance:
                    found.append(
                        f"{label} on {data}, d {dim}: AUC {auc:.4f}, {expected.auc:.4f} expected "
                        f"with a tolerance of {expected.tolerance:g}"
                    )
    known = {(label, (data, dim)) for data, dims in floor.floors.items() for dim, of in dims.items() for label in of}
    found += [
        f"{label} on {data}, d {dim}: not in the file"
        for label, (data, dim) in cells
        if (label, (data, dim)) not in known
    ]
    return found
