"""The benchmark of answers: both sides say the same, and what an experiment says of accuracy is joined to it."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.serve import Case, auc_losses, measure
from schemas.errors import UserError


@pytest.mark.parametrize("model", ["dare", "twin"])
def test_both_sides_give_the_same_logits(model: str) -> None:
    (figures,) = measure([Case(model, 8, "int8", 50)], table_rows=70_000, retrieved=5, requests=2, rounds=1)
    assert figures.same
    assert 0 < figures.p50_ms <= figures.p99_ms
    assert figures.vs_eager > 0
    assert figures.auc_loss is None


def test_what_does_not_exist_is_not_measured() -> None:
    with pytest.raises(UserError, match=r"^--rows: must be one of fp32, bf16, int8 \(not int4\)$"):
        Case("dare", 8, "int4", 50)  # type: ignore[arg-type]


def test_losses_are_those_of_an_experiment(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.parquet is missing; run `dare experiment"):
        auc_losses(tmp_path)
    cells = [
        *(("DARE (K_A 128)", "dare", 1, 0.78), ("DARE (K_A 64)", "dare", 1, 0.77), ("DARE (K_A 64)", "dare", 2, 0.5)),
        *(("TWIN (128)", "twin", 1, 0.76), ("TWIN (64)", "twin", 1, 0.77), ("TWIN (16)", "twin", 1, None)),
    ]
    pq.write_table(
        pa.Table.from_pylist([dict(zip(("label", "model", "seed", "auc"), cell, strict=True)) for cell in cells]),
        tmp_path / "results.parquet",
    )
    losses = auc_losses(tmp_path)
    # A seed that has no K_A of 128 beside it says nothing.
    assert losses == pytest.approx({("dare", 128): 0, ("dare", 64): 0.01, ("twin", 128): 0, ("twin", 64): -0.01})
