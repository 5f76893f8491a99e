"""Sending the next batch's ids ahead changes no bit of the training, whatever is predicted in between."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.distributed.train_pipeline import TrainPipelineBase

from pipeline.train.ahead import SearchAheadPipeline
from pipeline.train.click_task import ClickTask
from tests.datasets import random_users, write_dataset
from tests.distributed import run_ranks
from tests.runs import small_settings
from tests.toy_batch import part, toy_batch
from tests.trainers import CPU, trainer_of

STEPS = 8


def losses(data: Path, *, ahead: bool) -> tuple[list[float], dict[str, Any], int]:
    """Of each step, the weights at the end, and how many searches were begun before they were asked for."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    trainer = trainer_of(small_settings(), data)
    model, found, early = get_unwrapped_module(trainer.model), [], 0
    pipeline = trainer._pipeline
    if not ahead:
        pipeline = TrainPipelineBase(ClickTask(trainer.model), trainer._optimizer, CPU)
    assert isinstance(pipeline, SearchAheadPipeline) == ahead
    for targets in (24, 1):  # with one target, one of two ranks has none
        batches = iter([part(toy_batch(step, targets=targets), rank, ranks) for step in range(STEPS)])
        for step in range(STEPS):
            found.append(float(pipeline.progress(batches).loss))
            early += model.begun is not None
            if step % 3 == 1:
                trainer.model.eval()
                with torch.no_grad():
                    found += trainer.model(toy_batch(100 + step, targets=5 - rank)).logit_T.tolist()
                trainer.model.train()
        with pytest.raises(StopIteration):
            pipeline.progress(batches)
        pipeline.reset()
        assert model.begun is None
    return found, {name: _local(value) for name, value in trainer.model.state_dict().items()}, early


def _local(value: Any) -> list[torch.Tensor]:
    return [shard.tensor for shard in value.local_shards()] if hasattr(value, "local_shards") else [value]


def compared(data: Path) -> None:
    plain, weights, early = losses(data, ahead=False)
    assert early == 0
    found, ours, early = losses(data, ahead=True)
    assert early == 2 * (STEPS - 1)
    assert found == plain
    for name, parts in weights.items():
        for one, other in zip(parts, ours[name], strict=True):
            assert torch.equal(one, other), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_ids_that_travel_ahead_change_nothing(ranks: int, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", random_users(60))
    run_ranks(ranks, compared, tmp_path / "data")
