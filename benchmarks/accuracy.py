"""What an experiment reached, as the floor that later ones are checked against: `benchmarks/accuracy.json`.

dare experiment smoke --out runs/smoke
python -m benchmarks.accuracy runs/smoke > benchmarks/accuracy.json
"""

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq

from pipeline.experiment.folder import SETTINGS
from schemas.experiment import ExperimentSettings
from schemas.settings import load_settings

TOLERANCE = 0.03
"""Other machines add in another order, and short trainings spread."""
MARGIN = 0.01
"""Where little was learnt, half of it must be learnt again, or half of this."""


def floors(out: Path) -> dict[str, Any]:
    """Mean test AUC over seeds of all that is finished in the folder of an experiment, in the order of its table."""
    experiment = load_settings(ExperimentSettings, [out / SETTINGS])
    rows = pq.read_table(out / "results.parquet").to_pylist()
    reached: dict[str, dict[str, dict[str, Any]]] = {}
    for data in experiment.data:
        for dim in experiment.dims:
            for label in experiment.models:
                key = data, dim, label
                values = [row["auc"] for row in rows if (row["data"], row["dim"], row["label"]) == key and row["auc"]]
                if values:
                    auc = fmean(values)
                    tolerance = min(TOLERANCE, max(MARGIN, auc - 0.5) / 2)
                    floor = {"auc": round(auc, 4), "tolerance": round(tolerance, 4)}
                    reached.setdefault(data, {}).setdefault(str(dim), {})[label] = floor
    return {"experiment": experiment.name, "floors": reached}


if __name__ == "__main__":
    print(json.dumps(floors(Path(sys.argv[1])), indent=1))
