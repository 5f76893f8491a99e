"""A training step hardly ever waits for a GPU, whatever the number of ranks, and has few operators."""

import pytest
import torch
import torch.distributed as dist

from embeddings.initialization import initialize
from embeddings.models import build_model
from embeddings.sharding import make_plan, shard
from embeddings.sizes import DataSizes
from pipeline.planning.measuring import StepTask, made_up_batch
from pipeline.train.optimizer import DenseOptimizer
from pipeline.train.pipeline import SearchPrefetchPipeline, agree
from schemas.settings import load_settings
from schemas.train import TrainSettings
from tests.launcher import run_ranks
from tests.train.synchronisations import counting

CPU = torch.device("cpu")
LENGTH = 50
STEPS = 4


def step_counts(overrides: list[str]) -> tuple[dict[tuple[str, str], int], int]:
    """What a step waits for, by kind and place, and its operators; the step is one in the midst of others."""
    settings = load_settings(
        TrainSettings, overrides=["stream.batch_size=64", f"stream.history_length={LENGTH}", *overrides]
    )
    sizes = DataSizes.counted(items=20_000, categories=300, lengths={"history": LENGTH})
    model = build_model(settings.model, sizes, torch.device("meta"))
    sharded = shard(model, CPU, make_plan(model, CPU, settings.stream.batch_size))
    initialize(sharded, seed=1)
    optimizer = DenseOptimizer(sharded, settings.dense)
    task = StepTask(settings, sizes)
    batches = iter([made_up_batch(task, seed=10 * dist.get_rank() + seed) for seed in range(STEPS + 2)])
    pipeline = SearchPrefetchPipeline(sharded, optimizer, CPU)

    def step(number: int) -> None:
        output = pipeline.progress(batches)
        agree(number, output, optimizer.gradient_norm, False).result()

    for number in range(STEPS - 1):
        step(number)
    with counting() as counter:
        step(STEPS)
    return dict(counter.waits), sum(counter.launched.values())


def test_dare_hardly_ever_waits_and_has_few_operators() -> None:
    operators: dict[int, set[int]] = {}
    for ranks in (1, 2, 4):
        for waits, launched in run_ranks(ranks, step_counts, []):
            places = "\n".join(f"{count} {kind} {place}" for (kind, place), count in sorted(waits.items()))
            print(f"{ranks} ranks: {sum(waits.values())} waits, {launched} operators\n{places}")
            assert sum(waits.values()) <= 8, places
            operators.setdefault(ranks, set()).add(launched)
    # A step of one rank had 740 before it was made lean; this is half of them.
    assert max(operators[1]) <= 370
    # No operator, and so no loop, is there once for each rank.
    assert operators[2] == operators[4]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["twin", "din", "sdim", "sim-hard"])
def test_other_models_wait_no_more_for_more_ranks(name: str) -> None:
    two, four = (sum(run_ranks(ranks, step_counts, [f"model.name={name}"])[0][0].values()) for ranks in (2, 4))
    assert two == four
