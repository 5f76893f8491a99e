"""The parts of a search's score that small tables make: position, interval, category, and what else there is.

T = targets, M = behaviours of all users, R = rows of a small table, d = its dim, Q = queries (one, or one a target),
D = dim of the inherent features together.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from embeddings.batch import Bags, Batch, History
from embeddings.features import Rows, pooled_bags
from embeddings.search.topk.inputs import PartKind, ScorePart
from schemas.model import Feature

if TYPE_CHECKING:
    # Those who search without shards need no TorchRec.
    from embeddings.distributed.row_wise import RowWiseTable


class PairRows(NamedTuple):
    """How each pair of a target and a behaviour finds its row in a feature's small table; see `ScorePart`."""

    kind: PartKind
    column_M: Tensor | None = None
    value_T: Tensor | None = None
    mask: int = -1


def pair_rows(feature: Feature, batch: Batch, history: History) -> PairRows:
    """How pairs find their row of a feature's table, where targets and histories are as they come in a batch.

    It says for all pairs what `embeddings.features.behavior_row` says for some.
    """
    if feature == "position":
        return PairRows(PartKind.POSITION, value_T=history.end_T)
    if feature == "interval":
        return PairRows(PartKind.INTERVAL, history.timestamp_M, batch.timestamp_T)
    return PairRows(PartKind.VALUE, history.features_M[feature])


def of_bags(bags: Bags, column_M: Tensor, rows_Rd: Tensor) -> tuple[Tensor, PairRows]:
    """The rows of a feature with several values, one for each bag that behaviours have, and how pairs find them.

    Args:
        bags: of the data set.
        column_M: integer, the behaviours' numbers of bags.
        rows_Rd: all rows of the feature's table.
    """
    rows_Ud, slot_M, _ = pooled_bags(bags, column_M, rows_Rd)
    return rows_Ud, PairRows(PartKind.VALUE, slot_M.to(torch.int32))


def behavior_tables(
    tables: "Mapping[Feature, RowWiseTable]",
    small: Mapping[Feature, Tensor],
    columns: Mapping[str, Mapping[Feature, Tensor | None]],
    bags: Mapping[Feature, Bags],
) -> tuple[dict[Feature, Tensor], dict[str, dict[Feature, PairRows]]]:
    """Rows of the inherent features but item on a shard, which a behaviour's item row does not lie beside.

    Small tables are here as a whole; of larger ones the rows that are needed are fetched. Of a feature with several
    values there is a row for each bag. Every rank must call it.

    Args:
        tables: of the inherent features.
        small: all rows of those that are small.
        columns: by sequence and feature, the values of the behaviours on this shard, int32 (M,).
        bags: of the data set, for the features with several values.

    Returns:
        By feature, rows; and by sequence and feature, how pairs find them where that is not by value.
    """
    rows, found_by = dict[Feature, Tensor](), {sequence: dict[Feature, PairRows]() for sequence in columns}
    for feature, table in tables.items():
        whole_Rd = small.get(feature)
        if feature == "item":
            continue
        if whole_Rd is not None and feature not in bags:
            rows[feature] = whole_Rd
            continue
        parts = [part_M for of in columns.values() if (part_M := of[feature]) is not None]
        value_M = torch.cat(parts)
        if feature in bags:
            distinct = bags[feature].distinct(value_M)
            of_ids = table.fetch_distinct(distinct.id_E) if whole_Rd is None else (whole_Rd, distinct.id_E)
            rows[feature], slot_M = distinct.means(*of_ids), distinct.slot_X
        else:
            rows[feature], slot_M = table.fetch_distinct(value_M)
        for sequence, slots in zip(columns, slot_M.to(torch.int32).split(list(map(len, parts))), strict=True):
            found_by[sequence][feature] = PairRows(PartKind.VALUE, slots)
    return rows, found_by


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
    inherent_TD: Tensor,
    target_row: Callable[[Feature], Tensor | None],
    target_cross: Mapping[Feature, Tensor],
    bags: Mapping[Feature, Bags],
) -> Rows:
    """Rows of the targets, from which scores make their queries; features with one row for all targets keep one.

    Args:
        inherent_TD: rows of the targets' inherent features.
        target_row: takes a cross feature, returns the targets' rows in its table, integer (T,); None: row 0 for all.
        target_cross: all rows of the targets' cross tables.
        bags: of the data set, for the features with several values.

    Returns:
        (T, ...); a cross feature whose row is 0 for all targets has one row, (1, d).
    """
    cross = {}
    for feature, rows_Rd in target_cross.items():
        row_T = target_row(feature)
        # One row stays one row: a search then scores R rows once, not once for each of T targets.
        if row_T is None:
            cross[feature] = torch.zeros_like(rows_Rd[:1]) if feature in bags else rows_Rd[:1]
        elif feature in bags:
            cross[feature] = pooled_bags(bags[feature], row_T, rows_Rd).gathered()
        else:
            cross[feature] = rows_Rd.index_select(0, row_T)
    return Rows(inherent_TD, cross)
