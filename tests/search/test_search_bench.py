"""`dare bench search`: a small run gives all cases, the same result as torch, and its last line is one JSON list."""

import json

import pytest

from benchmarks import search
from benchmarks.cli import bench_search
from benchmarks.search import Case, SearchFigures
from tests.top_k_inputs import DTYPES


@pytest.mark.slow
def test_last_line_is_json(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cases = (*(Case(dim=16, length=30, k=4, dtype=dtype) for dtype in DTYPES), Case(16, 30, 4, targets_per_user=3))
    monkeypatch.setattr(search, "CPU_CASES", cases)
    monkeypatch.setattr(search, "CUDA_CASES", cases)
    monkeypatch.setattr(search, "MOST_TARGETS", 12)
    bench_search(rows=500, rounds=1, json=True)
    figures = [SearchFigures(**case) for case in json.loads(capfd.readouterr().out.splitlines()[-1])]
    assert [case.dtype for case in figures] == ["float32", "float16", "bfloat16", "int8", "float32"]
    assert all(case.exact and case.targets == 12 for case in figures)
    assert min(min(case.vs_torch, case.bandwidth_share, case.cost_vs_one_target) for case in figures) > 0
