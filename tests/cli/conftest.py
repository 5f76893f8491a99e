"""Fixtures for jobs that torchx describes and starts."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from torchx.runner import Runner, get_runner


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands of Slurm, which a dry run asks for the memory of nodes; `python` of a container prints a variable."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in {
        "sinfo": "exit 1",
        "srun": """while [ "$1" != bash ]; do shift; done; "${@:1:3}\"""",
        "python": 'printf "%s|" "$HOSTS" "${@: -1}"',
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with get_runner() as it:
        yield it
