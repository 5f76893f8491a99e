"""Sending the next batch's ids ahead changes no bit of the training, whatever is predicted in between."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.train_pipeline import TrainPipelineBase

from benchmarks import prefetch
from benchmarks.cli import bench_prefetch
from benchmarks.plan_estimates import Size
from pipeline.train.pipeline import ClickTask, SearchPrefetchPipeline
from tests.launcher import run_ranks
from tests.runs import small_settings
from tests.toy_batch import part, toy_batch
from tests.trainers import CPU, train_and_save, trainer_of

STEPS = 8


def losses(data: Path, *, begins: bool) -> tuple[list[float], dict[str, Any], int]:
    """The loss of each step, the weights at the end, and how many searches were started ahead of their step."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    trainer = trainer_of(small_settings(), data)
    found: list[float] = []
    early = 0
    pipeline = trainer._pipeline
    if not begins:
        pipeline = TrainPipelineBase(ClickTask(trainer.model), trainer._optimizer, CPU)
    assert isinstance(pipeline, SearchPrefetchPipeline) == begins
    for targets in (24, 1):  # with one target, one of two ranks has none
        batches = iter([part(toy_batch(step, targets=targets), rank, ranks) for step in range(STEPS)])
        for step in range(STEPS):
            found.append(float(pipeline.progress(batches).loss))
            early += getattr(pipeline, "_handle", None) is not None
            if step % 3 == 1:
                trainer.model.eval()
                with torch.no_grad():
                    found += trainer.model(toy_batch(100 + step, targets=5 - rank)).logit_T.tolist()
                trainer.model.train()
        with pytest.raises(StopIteration):
            pipeline.progress(batches)
        pipeline.reset()
        assert getattr(pipeline, "_handle", None) is None
    return found, {name: _local(value) for name, value in trainer.model.state_dict().items()}, early


def _local(value: Any) -> list[torch.Tensor]:
    return [shard.tensor for shard in value.local_shards()] if hasattr(value, "local_shards") else [value]


def compared(data: Path) -> None:
    plain, weights, early = losses(data, begins=False)
    assert early == 0
    found, ours, early = losses(data, begins=True)
    assert early == 2 * (STEPS - 1)
    assert found == plain
    for name, parts in weights.items():
        for one, other in zip(parts, ours[name], strict=True):
            assert torch.equal(one, other), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_ids_that_travel_ahead_change_nothing(ranks: int, few_users: Path) -> None:
    run_ranks(ranks, compared, few_users)


def measured(data: Path) -> None:
    """Losses do not depend on how often gradients are measured."""
    for name in ("dare", "twin", "din"):
        runs = []
        for log_every in (1, 1000):
            settings = small_settings(
                f"model={name}", "model.attention.dim=8", "checkpoint.every=1000", f"log_every={log_every}"
            )
            runs.append(train_and_save(settings, data, data.parent / f"{name}-{log_every}-{dist.get_world_size()}"))
        assert len(set(runs[0])) > 3
        assert runs[0] == runs[1], name


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_measuring_gradients_changes_no_loss(ranks: int, few_users: Path, tmp_path: Path) -> None:
    shutil.copytree(few_users, tmp_path / "data")
    run_ranks(ranks, measured, tmp_path / "data")


@pytest.mark.slow
def test_the_benchmarks_last_line_is_json(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "SIZES", [Size(targets=8, length=20, dim=4, retrieved=4)])
    bench_prefetch(json=True)
    (step,) = json.loads(capfd.readouterr().out.splitlines()[-1])["steps"]
    assert min(step["plain_ms"], step["prefetch_ms"]) > 0
