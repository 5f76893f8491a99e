"""Small models of the family whose weights all matter, unsharded and sharded, and what the shards of one hold."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed import DistributedModelParallel

from embeddings.batch import Batch
from embeddings.initialization import initialize
from embeddings.model import CtrModel
from embeddings.models import build_model
from embeddings.sharding import make_plan, shard
from embeddings.sizes import DataSizes
from schemas.model import ModelSettings, TableSet
from tests.toy_batch import MORE, toy_batch

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
    for part in sharded.local_shards():
        first, count = part.metadata.shard_offsets[0], part.metadata.shard_sizes[0]
        part.tensor.copy_(rows[first : first + count])


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
