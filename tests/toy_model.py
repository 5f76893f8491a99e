"""Small models of the family whose weights all matter, unsharded and sharded: what they hold, and what they learn."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed import DistributedModelParallel

from embeddings.batch import Batch
from embeddings.distributed.collectives import sum_over_ranks
from embeddings.initialization import initialize
from embeddings.loss import click_loss
from embeddings.model import CtrModel
from embeddings.models import build_model
from embeddings.sharding import make_plan, shard
from embeddings.sizes import DataSizes
from schemas.model import ModelSettings, TableSet
from tests.tolerance import largest, rounding, summands
from tests.toy_batch import MORE, part, toy_batch

if TYPE_CHECKING:
    from tests.model.definition import Definition

CPU = torch.device("cpu")
META = torch.device("meta")
ALL = ("item", "category", "position", "interval", "behavior", "scene")
LENGTHS = {"ads": 12, "content": 9, "history": 12}
MANY: dict[str, Any] = {
    "retrieved": {"ads": 4, "content": 6},
    "features": [
        *("brand", "scene", {"name": "maker", "attention": False}, "item", "tags", "price", "age", "position", "query"),
        *("category", "coupons", "color", "dwell", {"name": "behavior", "attention": False}, "discount", "income"),
        *("campaigns", "interests", "slot", "bid"),
    ],
    "context": TableSet(dim=4, optimizer="sgd", learning_rate=1.0),
}
"""Features of every kind on every side."""
TWO = {"retrieved": {"ads": 4, "content": 6}, "features": ALL}
OF_ANOTHER_SIZE = {
    *("dare-no-tr", "twin-no-tr", "twin-mlp-1", "din-short"),
    *(f"twin-projection-{of}" for of in ("no-item", "position", "category", "item", "small")),
}
"""Models that differ from others in what is projected or how large it is: for features of every kind, on one process,
they have quick tests of their own; what ranks exchange is the same."""
ONE = {"retrieved": {"ads": 4}}
SGD = {"optimizer": "sgd", "learning_rate": 1.0}


def settings_of(name: str, **changes: object) -> ModelSettings:
    """Settings of a model whose tables step by their whole gradient."""
    tables = {"attention": TableSet(dim=8, **SGD), "representation": TableSet(dim=8, **SGD)}
    return ModelSettings.model_validate({"name": name, "hash_bits": 12, "cluster_size": 3, **tables, **ONE, **changes})


def sizes_of(settings: ModelSettings) -> DataSizes:
    lengths = {name: LENGTHS[name] for name in settings.retrieved}
    sizes = DataSizes.counted(items=50, categories=categories_of(settings), behaviors=4, scenes=3, lengths=lengths)
    return replace(sizes, features={**sizes.features, **MORE})


def categories_of(settings: ModelSettings) -> int:
    """Few; with `MORE` features so many that three ranks have rows of them, and that a window has several.

    Where all behaviours of a window have one category, attention's gradient of its row is a sum that cancels.
    """
    return 3 if MORE.keys().isdisjoint(settings.feature_names) else 7


def batch_of(settings: ModelSettings, seed: int, **shape: int) -> Batch:
    lengths, more = dict(sizes_of(settings).lengths), not MORE.keys().isdisjoint(settings.feature_names)
    return toy_batch(seed, categories=categories_of(settings), lengths=lengths, more=more, **shape)


def model_of(settings: ModelSettings, seed: int = 1, tables: float = 30, dense: float = 20) -> CtrModel:
    """A model with weights so many times larger than first weights are that every part of it matters."""
    model = build_model(settings, sizes_of(settings))
    initialize(model, seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(tables if "embedding_bags" in name else dense if weight.dim() > 1 else 1)
    return model


def sharded_like(model: CtrModel) -> DistributedModelParallel:
    """A sharded model with the values of an unsharded one; needs a process group."""
    other = build_model(model.settings, model.sizes, META)
    sharded = shard(other, CPU, make_plan(other, CPU, batch_size=200))
    load_values(sharded, model.state_dict())
    return sharded


def load_values(sharded: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a sharded model the values of an unsharded one."""
    with torch.no_grad():
        for name, value in sharded.state_dict().items():
            if hasattr(value, "local_shards"):
                fill(value, state[name])
            else:
                value.copy_(state[name])


def fill(sharded: Any, rows: Tensor) -> None:
    """Give the shards that this rank holds of a table their part of all its rows."""
    for held in sharded.local_shards():
        first, count = held.metadata.shard_offsets[0], held.metadata.shard_sizes[0]
        held.tensor.copy_(rows[first : first + count])


def local_values(model: nn.Module) -> dict[str, list[tuple[int, Tensor]]]:
    """By name: (first row, values) of what this rank holds; all of it where nothing is sharded."""
    found = {}
    for name, value in model.state_dict().items():
        if hasattr(value, "local_shards"):
            found[name] = [(part.metadata.shard_offsets[0], part.tensor.clone()) for part in value.local_shards()]
        else:
            found[name] = [(0, value.clone())]
    return found


def together(by_rank: list[dict[str, list[tuple[int, Tensor]]]]) -> dict[str, Tensor]:
    """Whole tables, and the dense weights, which must be equal on all ranks, of what `local_values` found on each."""
    whole = {}
    for name in by_rank[0]:
        pieces = [piece for of_rank in by_rank for piece in of_rank[name]]
        if "embedding_bags" in name:
            whole[name] = torch.cat([rows for _, rows in sorted(pieces, key=lambda piece: piece[0])])
        else:
            for _, replica in pieces:
                assert torch.equal(replica, pieces[0][1]), f"{name} differs between ranks"
            whole[name] = pieces[0][1]
    return whole


def train_on_this_rank(settings: ModelSettings, shapes: Sequence[Mapping[str, int]], seed: int) -> dict[str, Any]:
    """A few steps: losses of the global batches, this rank's part of the model, and what rounding depends on.

    Args:
        settings: of the model.
        shapes: of each step's batch.
        seed: of the first batch; each further one has the next.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    # Weights that are not so large that rounding grows from step to step.
    plain = model_of(settings, tables=10, dense=10)
    sharded = sharded_like(plain)
    optimizer = torch.optim.SGD([value for key, value in sharded.named_parameters() if "_bags" not in key], lr=0.1)
    losses = []
    for step, shape in enumerate(shapes):
        batch = part(batch_of(settings, seed + step, **shape), rank, ranks)
        optimizer.zero_grad()
        loss = click_loss(sharded(batch), batch.label_T)
        loss.backward()
        optimizer.step()
        losses.append(sum_over_ranks(loss.detach()).item() / ranks)
    return {
        "losses": losses,
        "start": plain.state_dict(),
        "end": local_values(sharded),
        "summands": summands(plain, batch_of(settings, seed)),
        "pools_on_shards": sharded.module.pools_on_shards,
    }


def assert_trained_alike(outcomes: list[dict[str, Any]], alone: dict[str, Any], allowed: float) -> None:
    """Compare losses and weights of ranks that trained together with those of one rank alone.

    Args:
        outcomes: what `train_on_this_rank` has returned on each rank.
        alone: the same of one rank.
        allowed: how far losses may be apart; weights besides by what rounding their size makes.
    """
    assert outcomes[0]["losses"] == pytest.approx(alone["losses"], rel=0, abs=allowed)
    ends = together([alone["end"]])
    for key, values in together([outcome["end"] for outcome in outcomes]).items():
        atol = allowed + rounding(1, largest(ends[key]))
        torch.testing.assert_close(values, ends[key], atol=atol, rtol=0, msg=named(key))


def assert_gradients_equal(
    model: CtrModel, definition: "Definition", allowed: Callable[[float], float]
) -> dict[str, Tensor]:
    """Compare each gradient, and each statistic of batch normalisation, with the definition's, which has learnt.

    Returns:
        The definition's gradients; 0 of a table that it does not read.
    """
    learning = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    # The definition does not read the targets' table of a feature with several values that targets do not have.
    unread = (key for key in learning if definition.state[key].grad is None)
    assert all("_coupons_target_" in key for key in unread)
    expected = {key: of.grad if (of := definition.state[key]).grad is not None else 0 * of for key in learning}
    # What cancels in a gradient, as what attention adds to all scores of a target does, is as large as the others.
    atol = allowed(largest(*expected.values()))
    for key, weight in learning.items():
        torch.testing.assert_close(weight.grad, expected[key], atol=atol, rtol=0, msg=named(key))
    for key, statistic in definition.statistics.items():
        torch.testing.assert_close(model.state_dict()[key], statistic, atol=allowed(largest(statistic)), rtol=0)
    return expected


def named(name: str) -> Callable[[str], str]:
    """A message of `torch.testing` that begins with what was compared."""
    return lambda message: f"{name}: {message}"
