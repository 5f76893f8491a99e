"""Metrics against scikit-learn and slow loops: on one process, and on real ranks with the samples spread unevenly."""

import math
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import compute_curve

from embeddings.distributed.process_group import process_group
from pipeline.evaluate import samples as samples_module
from pipeline.evaluate.auc import Ranks, auc
from pipeline.evaluate.metrics import Evaluation, Metrics
from tests.launcher import run_ranks

Columns = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]
"""user, label, logit."""

CLOSE = {"rel": 1e-12, "abs": 1e-12, "nan_ok": True}


def expected(columns: Columns) -> dict[str, float]:
    from sklearn.metrics import log_loss, roc_auc_score  # slow to load, and the processes of ranks need not

    user, label, logit = columns
    exact = logit.astype(np.float64)
    probability = 1 / (1 + np.exp(-exact))
    count, positives = len(label), int(label.sum())
    found: dict[str, float] = {"samples": count, "positives": positives, "users": len(set(user.tolist()))}
    found["log_loss"] = float(np.logaddexp(0, np.where(label > 0, -exact, exact)).mean()) if count else math.nan
    found["calibration"] = probability.sum() / positives if positives else math.nan
    found |= {"auc": math.nan, "gauc": gauc_by_loops(columns), "normalized_entropy": math.nan}
    if 0 < positives < count:
        found["auc"] = roc_auc_score(label, logit)
        base = np.full(count, positives / count)
        found["normalized_entropy"] = found["log_loss"] / log_loss(label, base)
    return found


def gauc_by_loops(columns: Columns) -> float:
    of_user = defaultdict(list)
    for user, label, logit in zip(*(column.tolist() for column in columns), strict=True):
        of_user[user].append((label, logit))
    weighted, weight = 0.0, 0
    for rows in of_user.values():
        positive = [logit for label, logit in rows if label]
        negative = [logit for label, logit in rows if not label]
        if positive and negative:
            right = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
            weighted += len(rows) * right / (len(positive) * len(negative))
            weight += len(rows)
    return weighted / weight if weight else math.nan


def evaluate(columns: Columns, batch: int = 1000) -> Evaluation:
    return collect(columns, batch).compute()


def collect(columns: Columns, batch: int = 1000) -> Metrics:
    metrics = Metrics()
    user, label, logit = map(torch.from_numpy, columns)
    for start in range(0, len(label), batch):
        part = slice(start, start + batch)
        metrics.add(user[part], label[part], logit[part])
    return metrics


def draw(seed: int, count: int, values: int, users: int = 20, positive: float = 0.3) -> Columns:
    """Samples with scores of so many different values, ids from all of int64."""
    random = np.random.default_rng(seed)
    ids = random.integers(-(2**63), 2**63 - 1, users)
    scores = random.normal(-1, 2, values).astype(np.float32)
    label = (random.random(count) < positive).astype(np.float32)
    return random.choice(ids, count), label, random.choice(scores, count) if values else np.zeros(0, np.float32)


@st.composite
def columns_of_samples(draw_value: Any) -> Columns:
    score = st.one_of(
        st.sampled_from([-0.0, 0.0, 0.5, -1e-30, 80.0, -80.0]), st.floats(-30, 30, width=32, allow_subnormal=False)
    )
    row = st.tuples(st.sampled_from([-(2**63), -1, 0, 5, 2**63 - 1]), st.integers(0, 1), score)
    rows = draw_value(st.lists(row, max_size=40))
    user, label, logit = zip(*rows, strict=True) if rows else ((), (), ())
    return np.array(user, np.int64), np.array(label, np.float32), np.array(logit, np.float32)


@settings(max_examples=100, deadline=None)
@given(columns=columns_of_samples(), batch=st.integers(1, 12), chunk=st.integers(1, 9))
def test_one_process(columns: Columns, batch: int, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples_module, "CHUNK", chunk)
        assert asdict(evaluate(columns, batch)) == pytest.approx(expected(columns), **CLOSE)


def test_as_scikit_learn() -> None:
    from sklearn.metrics import log_loss, roc_auc_score

    user, label, logit = draw(seed=0, count=20_000, values=3_000)
    found = evaluate((user, label, logit))
    probability = 1 / (1 + np.exp(-logit.astype(np.float64)))
    assert found.auc == pytest.approx(roc_auc_score(label, probability), **CLOSE)
    assert found.log_loss == pytest.approx(log_loss(label, probability), **CLOSE)
    scores_of = {u: user == u for u in set(user.tolist())}
    areas = [roc_auc_score(label[mine], logit[mine]) for mine in scores_of.values()]
    assert found.gauc == pytest.approx(np.average(areas, weights=[m.sum() for m in scores_of.values()]), **CLOSE)


def test_far_logits_keep_their_loss() -> None:
    users = np.arange(2)
    found = evaluate((users, np.array([1, 0], np.float32), np.array([60, -60], np.float32)))
    assert found.log_loss == pytest.approx(math.exp(-60), rel=1e-12)
    found = evaluate((users, np.array([0, 1], np.float32), np.array([3e38, -3e38], np.float32)))
    assert found.log_loss == pytest.approx(3e38, rel=1e-6)


def test_adding_goes_on_after_compute() -> None:
    columns = draw(seed=1, count=300, values=50)
    metrics = collect(tuple(column[:100] for column in columns))
    metrics.compute()
    metrics.add(*(torch.from_numpy(column[100:]) for column in columns))
    assert metrics.compute() == evaluate(columns)


def cases(ranks: int) -> list[list[Columns]]:
    """In each case, the samples of each rank: even, uneven and missing shares, ties, one class, nothing."""
    found = []
    for seed in range(25):
        random = np.random.default_rng(seed)
        positive = [0.3, 0.01, 0.0, 1.0][seed % 4]
        columns = draw(
            seed, count=int(random.integers(0, 400)), values=[1, 2, 5, 1000][seed // 4 % 4], positive=positive
        )
        border = np.sort(random.integers(0, len(columns[0]) + 1, ranks - 1))
        if seed % 3 == 0:
            border[:] = border[0] if ranks > 1 else 0  # the ranks in the middle have none
        found.append(cut(columns, border))
    by_score = draw(50, count=3_000, values=700)
    order = np.argsort(by_score[2])
    found.append(cut(tuple(column[order] for column in by_score), np.array([2_500] * (ranks - 1))))
    found.append(cut(draw(51, count=140_000, values=90_000, users=20_000), np.array([1_000, 90_000][: ranks - 1])))
    found.append(cut(draw(52, count=0, values=1), np.zeros(ranks - 1, np.int64)))
    return found


def cut(columns: Columns, border: NDArray[np.int64]) -> list[Columns]:
    return list(zip(*(np.split(column, border) for column in columns), strict=True))


def evaluate_cases() -> list[Evaluation]:
    return [evaluate(shares[dist.get_rank()]) for shares in cases(dist.get_world_size())]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_ranks(ranks: int) -> None:
    if ranks == 1:
        with process_group(torch.device("cpu")):
            outcomes = [evaluate_cases()]
    else:
        outcomes = run_ranks(ranks, evaluate_cases)
    for outcome in outcomes[1:]:
        assert repr(outcome) == repr(outcomes[0]), "identical on every rank, nan included"
    for shares, found in zip(cases(ranks), outcomes[0], strict=True):
        union = tuple(np.concatenate(column) for column in zip(*shares, strict=True))
        assert asdict(found) == pytest.approx(expected(union), **CLOSE)


class Listening(Ranks):
    def __init__(self) -> None:
        super().__init__(None)
        self.received = 0

    def exchange(self, values_N: Tensor, count_W: Any) -> Tensor:
        result = super().exchange(values_N, count_W)
        self.received += len(result)
        return result


def bad_values_ties_and_groups() -> dict[str, Any]:
    rank = dist.get_rank()
    found: dict[str, Any] = {"errors": []}
    columns = draw(rank, count=100, values=40)
    columns[2][:3] = [math.nan, math.inf, -math.inf]
    columns[1][5:7] = [math.nan, 0.5]
    for bad_columns in ((2,), (1,)):
        clean = draw(rank, count=100, values=40)
        mine = tuple(columns[i] if rank == 1 and i in bad_columns else clean[i] for i in range(3))
        for method in (Metrics.compute, Metrics.distribution):
            with pytest.raises(ValueError) as error:
                method(collect(mine))
            found["errors"].append(str(error.value))

    listening = Listening()
    scores = torch.from_numpy(draw(rank, count=30_000, values=20_000)[2])
    scores[: 20_000 + 1_000 * rank] = 0.25
    auc(scores[::3], scores[1::3], listening)
    found["received"] = listening.received

    pair = dist.new_group([0, 2])
    if rank != 1:
        found["pair"] = collect(draw(rank, count=100, values=40)).compute(pair)
    return found


def test_bad_values_ties_and_groups() -> None:
    outcomes = run_ranks(3, bad_values_ties_and_groups)
    for outcome in outcomes:
        assert outcome["errors"] == [
            *["cannot evaluate logits that are not finite: 3 on rank 1"] * 2,
            *["cannot evaluate labels other than 0 and 1: 2 on rank 1"] * 2,
        ]
        assert outcome["received"] < 20_000, "a fair share: the score that most samples have is not sent"
    union = tuple(np.concatenate(c) for c in zip(*(draw(r, count=100, values=40) for r in (0, 2)), strict=True))
    assert outcomes[0]["pair"] == outcomes[2]["pair"]
    assert asdict(outcomes[0]["pair"]) == pytest.approx(expected(union), **CLOSE)


def test_distribution_for_tensorboard(tmp_path: Path) -> None:
    shares = [draw(seed, count=count, values=500) for seed, count in ((0, 900), (1, 0), (2, 2_000))]
    shares[0][2][:3] = [-200, 16, 200]
    outcomes = run_ranks(3, distribution_of, shares)
    _, label, logit = (np.concatenate(column) for column in zip(*shares, strict=True))
    exact = logit.astype(np.float64)
    for outcome in outcomes:
        curve = np.stack(list(outcome.pr_curve.values()))
        np.testing.assert_allclose(curve, compute_curve(label, 1 / (1 + np.exp(-exact)), num_thresholds=127))
        for name, mine in (("positive", exact[label > 0]), ("negative", exact[label == 0])):
            histogram = outcome.histograms[name]
            assert (histogram["min"], histogram["max"], histogram["num"]) == (mine.min(), mine.max(), len(mine))
            assert histogram["sum"] == pytest.approx(mine.sum(), rel=1e-9)
            assert histogram["sum_squares"] == pytest.approx(np.square(mine).sum(), rel=1e-9)
            limits = histogram["bucket_limits"]
            below = [np.count_nonzero(mine <= limit) for limit in limits]
            assert np.cumsum(histogram["bucket_counts"]).tolist() == below
            assert len(limits) <= 130
            quarters = [limit for limit in limits if abs(limit) <= 16]
            assert quarters == [quarter / 4 for quarter in range(round(4 * quarters[0]), round(4 * quarters[-1]) + 1)]
            assert all(limit == np.finfo(np.float64).max for limit in limits[len(quarters) :])
        # One logit is -200: its bucket is the one that ends at the lowest limit.
        assert min(histogram["bucket_limits"][0] for histogram in outcome.histograms.values()) == -16
        assert {counts.dtype for name, counts in outcome.pr_curve.items() if name.endswith("counts")} == {
            np.dtype("int64")
        }
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_pr_curve_raw("curve", **outcomes[0].pr_curve)
        for name, histogram in outcomes[0].histograms.items():
            writer.add_histogram_raw(name, **histogram)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["histograms"] == ["positive", "negative"]
    assert events.Tags()["tensors"] == ["curve"]


def distribution_of(shares: list[Columns]) -> Any:
    return collect(shares[dist.get_rank()]).distribution()


def test_distribution_of_nothing_or_one_class() -> None:
    nothing = Metrics().distribution()
    assert nothing.histograms == {}
    assert all(not values.any() for values in nothing.pr_curve.values())
    negative = collect(draw(0, count=20, values=9, positive=0.0)).distribution()
    assert list(negative.histograms) == ["negative"]
