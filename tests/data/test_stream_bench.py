"""`dare bench reader`: a small run gives all figures, and its last line is one JSON object."""

import json

import pytest

from benchmarks.cli import bench_item_features, bench_reader
from benchmarks.item_features import Case
from benchmarks.reader import ReaderFigures


@pytest.mark.slow
def test_last_line_is_json(capfd: pytest.CaptureFixture[str]) -> None:
    bench_reader(users=600, rounds=1, json=True)
    figures = ReaderFigures(**json.loads(capfd.readouterr().out.splitlines()[-1]))
    assert figures.targets == 600 * 57
    assert 200_000 < figures.behaviors < 400_000
    assert min(figures.vs_pyarrow, figures.samples_per_s) > 0
    assert figures.storage_vs_samples > 15


def test_features_beside_the_items_take_no_room_in_shards(capfd: pytest.CaptureFixture[str]) -> None:
    bench_item_features(users=600, rounds=1, json=True)
    one, five = (Case(**case) for case in json.loads(capfd.readouterr().out.splitlines()[-1]))
    assert one.beside_bytes_per_behavior == five.beside_bytes_per_behavior < one.stored_bytes_per_behavior
    assert one.stored_bytes_per_behavior + 4 < five.stored_bytes_per_behavior
    assert min(one.ratio, five.ratio) > 0
