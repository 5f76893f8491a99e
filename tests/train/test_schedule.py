"""The schedules of learning rates: against torch's schedulers, in the tables' own kernels, and over a killed run."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler

from pipeline.train.optimizer import scheduled
from schemas.train import ScheduleSettings
from tests.launcher import run_ranks
from tests.runs import Run, pause, small_settings
from tests.trainers import trainer_of

FALLING = ("dense.schedule=cosine", "dense.warmup_steps=3", "tables.schedule=linear", "tables.final_fraction=0.1")

settings_of_schedules = st.builds(
    ScheduleSettings,
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    warmup_steps=st.integers(0, 50),
    final_fraction=st.floats(0, 1),
)


@given(settings_of_schedules, st.integers(1, 200))
def test_it_rises_to_the_rate_and_falls_to_the_final_fraction(settings: ScheduleSettings, steps: int) -> None:
    curve = [scheduled(settings, step, steps) for step in range(1, steps + 1)]
    warmup = settings.warmup_steps
    rising, falling = curve[: max(0, warmup - 1)], curve[max(0, warmup - 1) :]
    assert rising == [step / warmup for step in range(1, len(rising) + 1)]
    if warmup and falling:
        assert falling[0] == 1
    assert all(one >= other - 1e-12 for one, other in pairwise(falling))
    assert all(min(1, settings.final_fraction) <= fraction <= 1 + 1e-12 for fraction in falling)
    if steps > warmup:
        last = 1.0 if settings.schedule == "constant" else settings.final_fraction
        assert curve[-1] == pytest.approx(last, abs=1e-12)
    # Nothing is remembered: any step alone, in any order, has the same rate, and one after the end has the last.
    assert [scheduled(settings, step, steps) for step in range(steps, 0, -1)] == curve[::-1]
    if steps > warmup:
        assert scheduled(settings, steps + 7, steps) == curve[-1]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 5])
def test_it_is_the_schedule_of_torch(kind: str, warmup: int) -> None:
    steps, final = 40, 0.2
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    falling: LRScheduler = (
        LinearLR(optimizer, 1.0, final, steps - warmup)
        if kind == "linear"
        else CosineAnnealingLR(optimizer, steps - warmup, final)
    )
    settings = ScheduleSettings(schedule=kind, warmup_steps=warmup, final_fraction=final)
    for step in range(warmup + 1, steps + 1):
        optimizer.step()
        falling.step()
        assert scheduled(settings, step, steps) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)


def rows_after_a_step(data: Path, optimizer: str, *overrides: str) -> dict[str, torch.Tensor]:
    """The tables' rows after one step in which they alone learn."""
    trainer = trainer_of(
        small_settings(
            f"model.attention.optimizer={optimizer}", f"model.representation.optimizer={optimizer}", *overrides
        ),
        data,
    )
    trainer._table_rates.set(1, trainer.steps)
    trainer._pipeline.progress(iter(trainer.stream))
    values = trainer.model.state_dict().items()
    return {name: value.local_tensor().clone() for name, value in values if "embedding_bags" in name}


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad"])
@pytest.mark.parametrize("search", ["shard", pytest.param("local", marks=pytest.mark.slow)])
def test_tables_learn_by_the_rate_of_the_step(few_users: Path, optimizer: str, search: str) -> None:
    (wanted,) = run_ranks(
        1,
        *(rows_after_a_step, few_users, optimizer, f"model.search={search}"),
        *("model.attention.learning_rate=0.25", "model.representation.learning_rate=0.125"),
    )
    (warming,) = run_ranks(
        1,
        *(rows_after_a_step, few_users, optimizer, f"model.search={search}", "tables.warmup_steps=2"),
        *("model.attention.learning_rate=0.5", "model.representation.learning_rate=0.25"),
    )
    (unlike,) = run_ranks(1, rows_after_a_step, few_users, optimizer, f"model.search={search}")
    assert wanted.keys() == warming.keys()
    assert all(torch.equal(rows, warming[name]) for name, rows in wanted.items())
    assert not all(torch.equal(rows, unlike[name]) for name, rows in wanted.items())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_goes_on_by_the_same_rates(ranks: int, many_users: Path, tmp_path: Path) -> None:
    settings = small_settings(*FALLING, "log_every=1")
    whole = Run(ranks, settings, many_users, tmp_path / "whole").finish()
    folder = tmp_path / "run"
    first = Run(ranks, settings, many_users, folder, pause, (7, tmp_path))
    first.wait_for_pause(tmp_path)
    first.kill()
    last = Run(ranks, settings, many_users, folder).finish()
    assert "goes on after step 4" in last.said()
    assert last.logs() == whole.logs()
    assert (folder / "test.json").read_text() == (whole.folder / "test.json").read_text()
    steps = last.logs()[0].count("\n")
    for run in (whole, last):
        curves = EventAccumulator(str(run.folder / "tensorboard")).Reload()
        dense, attention = (curves.Scalars(f"learning_rate/{name}") for name in ("dense", "attention"))
        assert [point.step for point in dense] == list(range(1, steps + 1))
        for index, (of_dense, of_table) in enumerate(zip(dense, attention, strict=True), 1):
            assert of_dense.value == pytest.approx(0.01 * scheduled(settings.dense, index, steps), abs=1e-7)
            assert of_table.value == pytest.approx(0.2 * (1 - 0.9 * index / steps), abs=1e-6)
    constant = Run(ranks, small_settings("log_every=1"), many_users, tmp_path / "constant").finish()
    assert constant.logs()[0] != whole.logs()[0]
