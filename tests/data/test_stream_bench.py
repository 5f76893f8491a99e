"""`dare bench reader`: a small run gives all figures, and its last line is one JSON object."""

import json

import pytest

from benchmarks.cli import bench_reader
from benchmarks.reader import ReaderFigures


def test_last_line_is_json(capfd: pytest.CaptureFixture[str]) -> None:
    bench_reader(users=600, rounds=1, json=True)
    figures = ReaderFigures(**json.loads(capfd.readouterr().out.splitlines()[-1]))
    assert figures.targets == 600 * 57
    assert 200_000 < figures.behaviors < 400_000
    assert min(figures.vs_pyarrow, figures.samples_per_s) > 0
    assert figures.storage_vs_samples > 15
