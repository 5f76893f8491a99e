"""`dare bench train`: both sides compute the same losses before they are timed, and a difference is not overlooked."""

import pytest
import torch

from benchmarks import training
from benchmarks.training import PaddedBatch, PlainDare, Size, measure
from embeddings.sizes import DataSizes
from pipeline.planning.measuring import StepTask, made_up_batch
from schemas.settings import load_settings
from schemas.train import TrainSettings


@pytest.mark.parametrize("tuned", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_losses_agree_and_both_sides_are_timed(tuned: bool) -> None:
    found = measure(items=500, batch=50, threads=1, rounds=1, categories=20, length=30, k=5, dim=8, tuned=tuned)
    assert [of_case["targets_per_user"] for of_case in found] == [1, 24]
    for of_case in found:
        # Not 0 to the last bit: the sums are made in another order.
        assert of_case["loss_difference"] <= 1e-5
        assert (of_case["items"], of_case["tuned"]) == (500, tuned)
        assert of_case["samples_per_s"] == pytest.approx(50 / of_case["step_ms"] * 1e3, rel=0.01)
        assert of_case["vs_dense_torch"] == pytest.approx(of_case["dense_step_ms"] / of_case["step_ms"], rel=0.05)


def padded(sharing: int) -> PaddedBatch:
    settings = load_settings(TrainSettings, overrides=["stream.batch_size=50"])
    task = StepTask(settings, DataSizes.counted(items=500, categories=20, lengths={"history": 30}))
    return PaddedBatch.of(made_up_batch(task, seed=1, targets_per_user=sharing))


def test_targets_of_a_user_share_a_history() -> None:
    batch = padded(24)
    assert len({tuple(row) for row in batch.item_BN.tolist()}) == 3  # of 24, 24 and 2 targets
    assert batch.position_BN[0].tolist() == [*range(30, 0, -1)]
    assert len({tuple(row) for row in padded(1).item_BN.tolist()}) == 50


def test_the_reference_learns_every_row() -> None:
    """As the authors' Adam does: rows that no target has seen move too, by weight decay."""
    plain = PlainDare(Size(500, 20, 30, 5, 8, 50), (20, 8))
    before = plain.attention["item"].weight.detach().clone()
    training._Plain(plain, TrainSettings().dense, fused=False).seconds(padded(24))
    moved = (plain.attention["item"].weight != before).any(1)
    assert moved.all()


def test_another_model_is_noticed() -> None:
    """The losses of a batch depend on K: a reference that keeps one behaviour more has another loss."""
    torch.manual_seed(1)
    plain, batch = PlainDare(Size(500, 20, 30, 5, 8, 50), (20, 8)), padded(1)
    losses = []
    with torch.no_grad():
        for plain.k in (5, 6):
            losses.append(float(torch.nn.functional.binary_cross_entropy_with_logits(plain(batch), batch.label_B)))
    assert abs(losses[0] - losses[1]) > 10 * training.ALLOWED * losses[0]
