"""What answers unpickles nothing: neither a file of the folder, nor through torch."""

import sys
from pathlib import Path

from tests.launcher import start, wait


def _load(folder: Path, errors: Path) -> None:
    sys.stderr = errors.open("w", buffering=1)
    import _pickle
    import pickle

    import torch

    from pipeline.serve.model import ServedModel

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("something is unpickled")

    torch.load = torch.serialization.load = refused
    pickle.load = pickle.loads = _pickle.load = _pickle.loads = refused
    pickle.Unpickler = _pickle.Unpickler = refused  # type: ignore[misc, assignment]
    ServedModel.load(folder)


def test_a_model_is_loaded_without_unpickling(exported_full: Path, tmp_path: Path) -> None:
    assert wait([start(_load, exported_full, tmp_path / "errors")]) == [0], (tmp_path / "errors").read_text()
