"""`dare bench extend`: a small run checks that both sides have the same histories, and counts what was carried."""

import json

import pytest

from benchmarks.cli import bench_extend


@pytest.mark.slow
def test_extend(capfd: pytest.CaptureFixture[str]) -> None:
    bench_extend(users=1000, behaviors=30, share=[0.05], json=True)
    (figures,) = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (figures["touched_users"], figures["day_events"], figures["carried"]) == (50, 500, 1500)
    # What is written for a day is its own: the first day's histories are links.
    assert 0 < figures["extend"]["output_mib"] < figures["anew"]["output_mib"]
    assert figures["extend"]["seconds"] > 0
