"""The paired bootstrap against a slow statement of it, and against DeLong's variance."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from pipeline.experiment.bootstrap import SEED, Predictions, paired_difference, replicated_auc


def predictions_of(user_N: np.ndarray, label_N: np.ndarray, score_N: np.ndarray) -> Predictions:
    user_id_U, place_N = np.unique(user_N, return_inverse=True)
    return Predictions(user_id_U, place_N, label_N.astype(bool), score_N.astype(np.float32))


def random_predictions(users: int, samples: int, seed: int, digits: int = 6) -> Predictions:
    rng = np.random.default_rng(seed)
    user_N = np.concatenate([np.arange(users), rng.integers(0, users, samples)])
    label_N = rng.random(len(user_N)) < 0.4
    return predictions_of(user_N, label_N, np.round(rng.random(len(user_N)) + 0.3 * label_N, digits))


def slowly(predictions: Predictions, replicates: int) -> np.ndarray:
    """Each replicate written out: the samples of every user that is drawn, as often as it is drawn."""
    rng = np.random.default_rng(SEED)
    found = []
    for _ in range(replicates):
        drawn = rng.integers(0, predictions.users, predictions.users)
        chosen = np.concatenate([np.flatnonzero(predictions.user_N == user) for user in drawn])
        labels = predictions.label_N[chosen]
        both = 0 < labels.sum() < len(labels)
        found.append(roc_auc_score(labels, predictions.score_N[chosen]) if both else np.nan)
    return np.array(found)


@settings(max_examples=40, deadline=None)
@given(
    users=st.integers(1, 12),
    samples=st.integers(0, 60),
    seed=st.integers(0, 1000),
    digits=st.integers(0, 3),
)
def test_replicates_are_those_written_out_with_ties(users: int, samples: int, seed: int, digits: int) -> None:
    predictions = random_predictions(users, samples, seed, digits)
    np.testing.assert_allclose(replicated_auc(predictions, 8), slowly(predictions, 8), atol=1e-12)


def test_a_replicate_does_not_depend_on_how_many_there_are() -> None:
    predictions = random_predictions(20, 100, seed=1)
    np.testing.assert_array_equal(replicated_auc(predictions, 300)[:150], replicated_auc(predictions, 150))


def test_the_order_of_samples_does_not_matter() -> None:
    predictions = random_predictions(20, 200, seed=2, digits=1)
    order = np.random.default_rng(0).permutation(len(predictions.label_N))
    shuffled = dataclasses.replace(
        predictions,
        user_N=predictions.user_N[order],
        label_N=predictions.label_N[order],
        score_N=predictions.score_N[order],
    )
    np.testing.assert_array_equal(replicated_auc(predictions, 50), replicated_auc(shuffled, 50))


def delong_covariance(label_N: np.ndarray, scores: list[np.ndarray]) -> np.ndarray:
    """Covariance of the AUCs of several scores of the same samples (DeLong and others, 1988)."""
    placements = []
    for score_N in scores:
        over_PM = (score_N[label_N][:, None] > score_N[~label_N][None, :]).astype(float)
        placements.append((over_PM.mean(1), over_PM.mean(0)))
    of_positives, of_negatives = (np.cov([place[side] for place in placements]) for side in (0, 1))
    return of_positives / label_N.sum() + of_negatives / (~label_N).sum()


def test_with_one_sample_a_user_the_spread_is_delongs() -> None:
    rng = np.random.default_rng(3)
    samples = 3000
    label_N = rng.random(samples) < 0.3
    shared_N = rng.normal(size=samples)
    scores = [shared_N + rng.normal(size=samples) + shift * label_N for shift in (1.0, 1.1)]
    replicates = [replicated_auc(predictions_of(np.arange(samples), label_N, score_N)) for score_N in scores]
    covariance = delong_covariance(label_N, scores)
    assert np.std(replicates[0]) == pytest.approx(np.sqrt(covariance[0, 0]), rel=0.06)
    expected = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert np.std(replicates[0] - replicates[1]) == pytest.approx(expected, rel=0.06)

    aucs = [roc_auc_score(label_N, score_N) for score_N in scores]
    found = paired_difference([replicates[0]], [replicates[1]], aucs[0] - aucs[1])
    assert found.low == pytest.approx(aucs[0] - aucs[1] - 1.96 * expected, abs=0.15 * expected)
    assert found.high == pytest.approx(aucs[0] - aucs[1] + 1.96 * expected, abs=0.15 * expected)


def test_a_model_does_not_differ_from_itself() -> None:
    replicates = replicated_auc(random_predictions(30, 300, seed=4))
    found = paired_difference([replicates], [replicates], 0.0)
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_what_is_always_better_has_the_smallest_p() -> None:
    worse = random_predictions(30, 300, seed=5)
    better = dataclasses.replace(worse, score_N=worse.label_N.astype(np.float32))
    found = paired_difference([replicated_auc(better, 999)], [replicated_auc(worse, 999)], 0.3)
    assert found.p == pytest.approx(2 / 1000)
    assert found.low > 0


def test_seeds_are_averaged_within_a_replicate() -> None:
    rng = np.random.default_rng(6)
    first, second = rng.random((3, 500)), rng.random((3, 500))
    found = paired_difference(list(first), list(second), 0.0)
    by_hand = [np.mean([first[s, r] - second[s, r] for s in range(3)]) for r in range(500)]
    assert found.low == pytest.approx(np.quantile(by_hand, 0.025))
    assert found.p == pytest.approx(
        min(1, 2 * (min(np.sum(np.less_equal(by_hand, 0)), np.sum(np.greater_equal(by_hand, 0))) + 1) / 501)
    )


def test_users_that_are_named_by_text_are_read_the_same_each_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    user_N = rng.integers(0, 40, 300)
    # In an order that is that of the numbers, so that both are the same users.
    names = np.array([f"Ü {number:03}" for number in range(40)])
    columns = {"label": rng.integers(0, 2, 300).astype(np.int8), "score": rng.random(300)}
    for name, user_id in (("numbers", user_N), ("texts", names[user_N])):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"user_id": user_id, **columns}), tmp_path / name / "part-00000.parquet")
    numbers, texts, again = (Predictions.read(tmp_path / name) for name in ("numbers", "texts", "texts"))
    assert texts.user_id_U.tolist() == names[numbers.user_id_U].tolist()
    assert texts.user_N.tolist() == numbers.user_N.tolist()
    assert texts.user_id_U.tobytes() == again.user_id_U.tobytes(), "what tells users apart is content, not addresses"
    assert replicated_auc(texts, 20).tolist() == replicated_auc(numbers, 20).tolist()
