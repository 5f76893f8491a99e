"""Random batches with all that a batch can have: several users, overlapping and empty windows, targets of one user.

U users, M behaviours, T targets.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from embeddings.batch import Bags, Batch, History
from embeddings.sizes import FeatureSize

MORE = {
    "brand": FeatureSize("item", rows=9),
    "maker": FeatureSize("item", rows=6),
    "tags": FeatureSize("item", "ids", rows=11, bags=13),
    "color": FeatureSize("item", rows=7),
    "price": FeatureSize("item", "number"),
    "query": FeatureSize("behavior", "ids", rows=8, bags=9, target=True),
    "coupons": FeatureSize("behavior", "ids", rows=5, bags=6),
    "dwell": FeatureSize("behavior", "number"),
    "discount": FeatureSize("behavior", "number", target=True),
    "age": FeatureSize("user", rows=7),
    "interests": FeatureSize("user", "ids", rows=10, bags=12),
    "income": FeatureSize("user", "number"),
    "slot": FeatureSize("impression", rows=5),
    "campaigns": FeatureSize("impression", "ids", rows=6, bags=5),
    "bid": FeatureSize("impression", "number"),
}
"""Features of every kind on every side, beside category, behavior and scene."""


def toy_batch(
    seed: int,
    *,
    users: int = 5,
    targets: int = 12,
    items: int = 50,
    categories: int = 7,
    behaviors: int = 4,
    scenes: int = 3,
    longest: int = 30,
    lengths: dict[str, int] | None = None,
    more: bool = False,
) -> Batch:
    """A batch whose windows have up to ``lengths[sequence]`` behaviours of users who have up to ``longest``.

    ``more``: with `MORE` features.
    """
    draw = torch.Generator().manual_seed(seed)

    def ids(count: int, size: int) -> torch.Tensor:
        return torch.randint(0, count + 1, (size,), generator=draw, dtype=torch.int32)

    user_T = torch.randint(0, users, (targets,), generator=draw) if users else torch.zeros(0, dtype=torch.int64)
    histories = {}
    for name, length in (lengths or {"history": 12}).items():
        size_U = torch.randint(0, longest + 1, (users,), generator=draw)
        offset_U = torch.cat([torch.zeros(1, dtype=torch.int64), size_U.cumsum(0)])
        count = int(offset_U[-1])
        end_T = offset_U[user_T] + (torch.rand(targets, generator=draw) * (size_U[user_T] + 1)).long()
        histories[name] = History(
            item_M=ids(items, count),
            **_columns(ids, draw, count, categories, behaviors, scenes),
            offset_U=offset_U,
            start_T=torch.maximum(offset_U[user_T], end_T - length),
            end_T=end_T,
        )
    batch = Batch(
        histories=histories,
        user_T=user_T,
        user_id_U=torch.arange(users),
        item_T=ids(items, targets),
        features_T={"category": ids(categories, targets), "scene": ids(scenes, targets)},
        timestamp_T=torch.full((targets,), 100_000),
        labels_T={"label": torch.randint(0, 2, (targets,), generator=draw).float()},
        origin=f"toy batch {seed}",
    )
    return with_more(batch, seed) if more else batch


def with_more(batch: Batch, seed: int) -> Batch:
    """A batch with `MORE` features; the bags are those of all batches."""
    draw = torch.Generator().manual_seed(1000 + seed)

    def columns(size: int, of: str, of_targets: bool = False) -> dict[str, Tensor]:
        return {
            name: torch.randn(size, generator=draw)
            if feature.kind == "number"
            else torch.randint(0, 1 + (feature.bags or feature.rows), (size,), generator=draw, dtype=torch.int32)
            for name, feature in MORE.items()
            if feature.of in of and not (of_targets and feature.of == "behavior" and not feature.target)
        }

    histories = {
        name: replace(history, features_M=history.features_M | columns(len(history.item_M), "item, behavior"))
        for name, history in batch.histories.items()
    }
    features_T = batch.features_T | columns(len(batch), "item, behavior, impression", of_targets=True)
    return replace(
        batch, histories=histories, features_T=features_T, features_U=columns(batch.users, "user"), bags=BAGS
    )


def _bags(name: str) -> Bags:
    """Bags of one, two or four different ids, so that means of small integers are exact; and the empty one."""
    size, draw = MORE[name], torch.Generator().manual_seed(len(name))
    found = [torch.zeros(0, dtype=torch.int64)]
    for _ in range(size.bags):
        count = 2 ** int(torch.randint(0, 3, (), generator=draw))
        found.append(torch.randperm(size.rows, generator=draw)[:count].add(1).sort().values)
    offset_B1 = torch.tensor([0, *map(len, found)]).cumsum(0)
    return Bags(offset_B1, torch.cat(found).to(torch.int32))


BAGS = {name: _bags(name) for name, size in MORE.items() if size.kind == "ids"}


def _columns(
    ids: Callable[[int, int], Tensor], draw: torch.Generator, count: int, categories: int, behaviors: int, scenes: int
) -> dict[str, Any]:
    # Drawn in this order, so that batches of a seed stay what they are.
    category_M, timestamp_M = ids(categories, count), torch.randint(0, 100_000, (count,), generator=draw)
    features_M = {"category": category_M, "behavior": ids(behaviors, count), "scene": ids(scenes, count)}
    return {"timestamp_M": timestamp_M, "features_M": features_M}


def part(batch: Batch, rank: int, ranks: int) -> Batch:
    """Every ``ranks``-th target of the batch, all users."""
    mine = slice(rank, None, ranks)
    return Batch(
        histories={
            name: History(
                **{**vars(history), "start_T": history.start_T[mine], "end_T": history.end_T[mine]},
            )
            for name, history in batch.histories.items()
        },
        user_T=batch.user_T[mine],
        user_id_U=batch.user_id_U,
        item_T=batch.item_T[mine],
        timestamp_T=batch.timestamp_T[mine],
        features_T={name: column_T[mine] for name, column_T in batch.features_T.items()},
        labels_T={name: label_T[mine] for name, label_T in batch.labels_T.items()},
        features_U=batch.features_U,
        weight_T=None if batch.weight_T is None else batch.weight_T[mine],
        bags=batch.bags,
        origin=f"{batch.origin}, part {rank} of {ranks}",
    )
