"""A search writes nothing of the size of the (target, behaviour) pairs, unless a score can be made in no other way."""

import pytest
import torch.distributed as dist

from embeddings.initialization import initialize
from embeddings.models import build_model
from embeddings.search import local
from embeddings.sharding import make_plan, shard
from embeddings.sizes import DataSizes
from pipeline.planning.measuring import StepTask, made_up_batch
from schemas.settings import load_settings
from schemas.train import TrainSettings
from tests.launcher import run_ranks
from tests.search.memory import peak_of_arrays, peak_of_tensors
from tests.toy_model import CPU, META

LENGTH, TARGETS, TARGETS_OF_USER, K = 2000, 512, 256, 4
PAIRS = LENGTH * TARGETS
"""250 times as many as behaviours, and 500 times as many as results: a byte for each of those hardly shows."""


def bytes_of_a_pair(name: str, place: str) -> tuple[float, float]:
    """Bytes of tensors and of numpy's arrays that a search has at the worst moment, beyond its inputs, a pair."""
    # Of the models that score pair by pair, what does not grow with the pairs is kept small.
    local.CHUNK_PAIRS = {"cpu": LENGTH}
    settings = load_settings(
        TrainSettings,
        overrides=[
            f"stream.batch_size={TARGETS}",
            f"stream.history_length={LENGTH}",
            f"model.name={name}",
            f"model.search={place}",
            f"model.retrieved.history={K}",
            "model.features=[item,category,position,interval,behavior,scene]",
        ],
    )
    sizes = DataSizes.counted(items=5000, categories=100, behaviors=4, scenes=3, lengths={"history": LENGTH})
    model = build_model(settings.model, sizes, META)
    sharded = shard(model, CPU, make_plan(model, CPU, batch_size=TARGETS))
    initialize(sharded, seed=1)
    task = StepTask(settings, sizes)
    # A small search first: what is compiled and what threads keep is made once in a process.
    batches = [made_up_batch(task, seed, TARGETS_OF_USER) for seed in (10 + dist.get_rank(), 20 + dist.get_rank())]
    small = model.tables.small_rows(CPU)
    model.search(batches[0], small, model.start_search(batches[0]))

    def search() -> None:
        chosen = model.search(batches[1], small, model.start_search(batches[1]))
        assert chosen["history"].valid_TK.all()

    dist.barrier()
    tensors = peak_of_tensors(search)
    dist.barrier()
    return tensors / PAIRS, peak_of_arrays(search) / PAIRS


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("name", "place"), [("dare", "shard"), ("twin", "local"), ("sim-hard", "shard")])
@pytest.mark.slow
def test_nothing_is_written_for_a_pair(name: str, place: str, ranks: int) -> None:
    for tensors, arrays in run_ranks(ranks, bytes_of_a_pair, name, place):
        print(f"{name}, {place}, {ranks} ranks: {tensors:.2f} bytes of tensors a pair, {arrays:.2f} of arrays")
        # What there is of behaviours, targets, rows and results; one byte a pair more would show.
        assert tensors < 1.5
        assert arrays < 0.25


@pytest.mark.parametrize("name", ["twin-v2", "din"])
def test_scores_that_are_made_pair_by_pair_are_one_float_each(name: str) -> None:
    """Clusters weigh by how many are in them, and a perceptron sees both rows: no kernel can make these scores."""
    for tensors, arrays in run_ranks(1, bytes_of_a_pair, name, "shard"):
        print(f"{name}: {tensors:.2f} bytes of tensors a pair, {arrays:.2f} of arrays")
        # The measure sees what is there: a float a pair.
        assert 4 <= tensors < 8
        assert arrays < 0.25
