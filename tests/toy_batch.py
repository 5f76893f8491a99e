"""Random batches with all that a batch can have: several users, overlapping and empty windows, targets of one user.

U users, M behaviours, T targets.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from embeddings.batch import Batch, History


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
) -> Batch:
    """A batch whose windows have up to ``lengths[sequence]`` behaviours of users who have up to ``longest``."""
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
    return Batch(
        histories=histories,
        user_T=user_T,
        user_id_U=torch.arange(users),
        item_T=ids(items, targets),
        features_T={"category": ids(categories, targets), "scene": ids(scenes, targets)},
        timestamp_T=torch.full((targets,), 100_000),
        labels_T={"label": torch.randint(0, 2, (targets,), generator=draw).float()},
        origin=f"toy batch {seed}",
    )


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
