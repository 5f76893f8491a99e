"""Which row of a small table describes the meeting of a behaviour and a target.

T = targets, K = behaviours selected of each, M = behaviours of all users, R = rows of a table, d = its dim,
X = any shape of (target, behaviour) pairs.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import embedding

from embeddings.batch import Batch, History
from embeddings.interval import interval_bucket
from embeddings.search.selection import Selection, taken
from schemas.model import Feature

TARGET_ROW = 0
"""The target's own row of position, interval and behavior; a behaviour has it only where its type is unknown."""


def behavior_row(feature: Feature, batch: Batch, history: History, behavior_X: Tensor, target_X: Tensor) -> Tensor:
    """Rows of behaviours, seen from targets.

    Args:
        feature: a cross feature.
        batch: the targets.
        history: the behaviours.
        behavior_X: int64, which of the M behaviours.
        target_X: int64, which of the T targets; broadcasts against ``behavior_X``.

    Returns:
        int32 or int64 (X).
    """
    if feature == "position":
        return history.end_T[target_X] - behavior_X
    if feature == "interval":
        return interval_bucket(batch.timestamp_T[target_X] - taken(history.timestamp_M, behavior_X))
    column_M = history.behavior_M if feature == "behavior" else history.scene_M
    if column_M is None:
        raise ValueError(f"model.features: {feature} is not in the histories of {batch.origin}")
    return taken(column_M, behavior_X)


def target_row(feature: Feature, batch: Batch) -> Tensor | None:
    """Rows of the targets themselves, int32 (T,); None: ``TARGET_ROW`` for all."""
    if feature != "scene":
        return None
    if batch.scene_T is None:
        raise ValueError(f"model.features: scene is not in the targets of {batch.origin}")
    return batch.scene_T


def target_rows(batch: Batch, tables: Mapping[Feature, Tensor]) -> dict[Feature, Tensor]:
    """The targets' rows themselves, (T, d), taken from all rows of each table."""
    found: dict[Feature, Tensor] = {}
    for feature, rows_Rd in tables.items():
        row_T = target_row(feature, batch)
        found[feature] = rows_Rd[TARGET_ROW].expand(len(batch), -1) if row_T is None else embedding(row_T, rows_Rd)
    return found


def selected_rows(
    batch: Batch, history: History, selected: Selection, tables: Mapping[Feature, Tensor]
) -> dict[Feature, Tensor]:
    """Rows of the selected behaviours, (T, K, d), taken from all rows of each table; row 0 for padding."""
    target_T1 = torch.arange(len(batch), device=selected.behavior_TK.device)[:, None]
    found: dict[Feature, Tensor] = {}
    for feature, rows_Rd in tables.items():
        row_TK = behavior_row(feature, batch, history, selected.behavior_TK, target_T1)
        found[feature] = embedding(torch.where(selected.valid_TK, row_TK, 0), rows_Rd)
    return found
