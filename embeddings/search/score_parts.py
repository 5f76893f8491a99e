"""The parts of a search's score that small tables make: position, interval, category, behaviour type, scene.

T = targets, M = behaviours of all users, R = rows of a small table, d = its dim, Q = queries (one, or one a target),
D = dim of the inherent features together.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from embeddings.batch import Batch, History
from embeddings.features import Rows
from embeddings.search.topk.inputs import PartKind, ScorePart
from schemas.errors import UserError
from schemas.model import Feature


class PairRows(NamedTuple):
    """How each pair of a target and a behaviour finds its row in a feature's small table; see `ScorePart`."""

    kind: PartKind
    column_M: Tensor | None = None
    value_T: Tensor | None = None
    mask: int = -1


def pair_rows(feature: Feature, batch: Batch, history: History) -> PairRows:
    """How pairs find their row of a feature's table, where targets and histories are as they come in a batch.

    It says for all pairs what `embeddings.features.behavior_row` says for some.

    Raises:
        UserError: the batch lacks the feature.
    """
    if feature == "position":
        return PairRows(PartKind.POSITION, value_T=history.end_T)
    if feature == "interval":
        return PairRows(PartKind.INTERVAL, history.timestamp_M, batch.timestamp_T)
    column_M = history.features_M.get(feature)
    if column_M is None:
        raise UserError(f"model.features: {feature} is not in the histories of {batch.origin}")
    return PairRows(PartKind.VALUE, column_M)


def score_parts(
    queries: Mapping[Feature, Tensor], tables: Mapping[Feature, Tensor], pairs: Mapping[Feature, PairRows]
) -> list[ScorePart]:
    """The parts of the score, a feature each.

    Args:
        queries: by feature, (T, d), or (1, d) for all targets.
        tables: by feature, all rows of the behaviours' tables.
        pairs: by feature, how pairs find their rows.
    """
    return [
        ScorePart(pairs[feature].kind, rows_Rd, queries[feature].contiguous(), *pairs[feature][1:])
        for feature, rows_Rd in tables.items()
    ]


def search_rows(
    inherent_TD: Tensor, target_row: Callable[[Feature], Tensor | None], target_cross: Mapping[Feature, Tensor]
) -> Rows:
    """Rows of the targets, from which scores make their queries; features with one row for all targets keep one.

    Args:
        inherent_TD: item and category rows of the targets.
        target_row: takes a cross feature, returns the targets' rows in its table, integer (T,); None: row 0 for all.
        target_cross: all rows of the targets' cross tables.

    Returns:
        (T, ...); a cross feature whose row is 0 for all targets has one row, (1, d).
    """
    cross = {}
    for feature, rows_Rd in target_cross.items():
        row_T = target_row(feature)
        # One row stays one row: a search then scores R rows once, not once for each of T targets.
        cross[feature] = rows_Rd[:1] if row_T is None else rows_Rd.index_select(0, row_T)
    return Rows(inherent_TD, cross)
