"""A run whose checkpoints are full ones and deltas; a model made of a raw log; the command line in a test's process."""

from pathlib import Path

import pytest

from pipeline.export.export import export_run
from pipeline.runs.checkpoint import checkpoints_in
from tests.data.conftest import dare
from tests.exported import FEATURES, Deltas
from tests.featured import Log, write_featured
from tests.runs import Run, small_settings
from tests.served import exported, raw_log

__all__ = ["dare", "exported", "raw_log"]


@pytest.fixture(scope="session")
def deltas(tmp_path_factory: pytest.TempPathFactory) -> Deltas:
    folder = tmp_path_factory.mktemp("deltas")
    write_featured(folder / "data", Log.random(60, seed=1), seed=1)
    settings = small_settings(
        *("epochs=1", "checkpoint.every=100", "checkpoint.delta_every=1", "checkpoint.keep=9", "stream.batch_size=8"),
        *(f"model.features={FEATURES}", "model.context.dim=4", "model.tasks=[click,buy]", "validation.every=100"),
    )
    run = Run(2, settings, folder / "data", folder / "run").finish().folder
    checkpoints = checkpoints_in(run / "checkpoints")
    delta = next(each for each in checkpoints if each.base is not None)
    (full,) = (each for each in checkpoints if delta.base is not None and each.step == delta.base.step)
    return Deltas(run, folder / "data", full, delta)


@pytest.fixture(scope="session")
def exported_full(deltas: Deltas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full checkpoint, exported in float32."""
    out = tmp_path_factory.mktemp("exported") / "full"
    export_run(deltas.run, out, str(deltas.full.step), compile=False)
    return out
