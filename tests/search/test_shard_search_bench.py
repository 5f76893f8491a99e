"""`dare bench shard-search`: both sides agree, and what a rank sends is counted."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.shard_search import Case, measure
from pipeline.planning.measuring import TrafficCounter
from tests.launcher import run_ranks


@pytest.mark.slow
def test_both_sides_find_the_same() -> None:
    (found,) = measure(ranks=2, rows=5_000, rounds=1, cases=(Case(dim=16, length=50, k=7, samples=20),))
    assert found["exact"]
    assert found["vs_stock"] > 0
    # A behaviour is a word, of which half stay on their rank; so do half of the scores and indices.
    assert found["bytes_per_sample"] == pytest.approx(50 * 4 / 2 + 7 * 5 / 2 + 16 * 4, rel=0.3)
    assert found["stock_bytes_per_sample"] == pytest.approx(51 * (4 + 16 * 4) / 2, rel=0.2)


def sent() -> dict[str, Any]:
    values, ranks = torch.zeros(6, dtype=torch.float32), dist.get_world_size()
    found = {}
    with TrafficCounter() as traffic:
        dist.all_to_all_single(torch.empty(6), values, [3, 3], [3, 3])
    found["all to all"] = traffic.bytes
    with TrafficCounter() as traffic:
        dist.all_gather_into_tensor(torch.empty(6 * ranks), values)
    found["all-gather"] = traffic.bytes
    with TrafficCounter() as traffic:
        dist.all_reduce(values)
    found["all-reduce"] = traffic.bytes
    return found


def test_traffic_is_what_leaves_a_rank() -> None:
    for found in run_ranks(2, sent):
        assert found == {"all to all": 12, "all-gather": 24, "all-reduce": 24}
