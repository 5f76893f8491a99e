"""`dare bench extend`: a small run checks that both sides have the same histories, and counts what was carried."""

import json

import pytest

from benchmarks.cli import bench_extend


@pytest.mark.slow
def test_extend(capfd: pytest.CaptureFixture[str]) -> None:
    bench_extend(users=200, behaviors=7, of_day=3, share=[0.01, 0.5], json=True)
    one, other = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (one["touched_users"], one["day_events"], one["carried"]) == (2, 6, 14)
    assert (other["touched_users"], other["day_events"], other["carried"]) == (100, 300, 700)
    for figures in (one, other):
        # What is written for a day is its own: the first day's histories are links.
        assert 0 < figures["extend"]["output_mib"] < figures["anew"]["output_mib"]
        assert figures["extend"]["seconds"] > 0
