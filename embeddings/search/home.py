"""Search at home: the attention rows of all behaviours come to the rank that owns the sample, and it keeps the K best.

M = behaviours of all users, T = targets, W = (target, behaviour) pairs.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from embeddings.batch import Batch
from embeddings.cross_features import behavior_row, target_row
from embeddings.scoring import ScaledDotProduct
from embeddings.search.pairs import Pairs, cross_score
from embeddings.search.selection import Selection
from embeddings.search.top_k import top_k
from embeddings.tables import AllCrossRows, Tables
from schemas.model import Feature


@torch.no_grad()
def search_at_home(
    batch: Batch,
    tables: Tables,
    scoring: ScaledDotProduct,
    target_set: str,
    history_set: str,
    cross: AllCrossRows,
    retrieved: Mapping[str, int],
    bags: int,
) -> dict[str, Selection]:
    """The K best behaviours of each target in each sequence, by a score that is a dot product of rows.

    Each user's behaviours are looked up once, whatever the number of the user's targets.

    Args:
        batch: the targets and their histories.
        tables: where the rows are.
        scoring: the score.
        target_set: the set of tables that targets are looked up in.
        history_set: the set that behaviours are looked up in.
        cross: by set, the rows of the cross tables.
        retrieved: K by sequence.
        bags: the most targets and behaviours together that a rank has; the same on all ranks.

    Returns:
        By sequence.
    """
    histories = [batch.histories[sequence] for sequence in retrieved]
    behaviors = sum(len(history.item_M) for history in histories)
    items = [history.item_M for history in histories]
    categories = [history.category_M for history in histories]

    def rows(name: str, item: list[Tensor], category: list[Tensor]) -> Tensor:
        ids: dict[Feature, Tensor] = {"item": torch.cat(item), "category": torch.cat(category)}
        return tables.inherent_rows(name, ids, torch.ones_like(ids["item"], dtype=torch.bool), bags)

    if target_set == history_set:
        together = rows(history_set, [*items, batch.item_T], [*categories, batch.category_T])
        behavior_MD, target_TD = together.split([behaviors, len(batch)])
    else:
        behavior_MD = rows(history_set, items, categories)
        target_TD = rows(target_set, [batch.item_T], [batch.category_T])

    query_TD = scoring.inherent_query(target_TD)
    target_T = torch.arange(len(batch), device=query_TD.device)
    found = {}
    parts = behavior_MD.split([len(item_M) for item_M in items])
    for (sequence, k), history, rows_MD in zip(retrieved.items(), histories, parts, strict=True):
        ids_M = torch.arange(len(rows_MD), device=rows_MD.device)
        pairs = Pairs(history.start_T, history.end_T, len(rows_MD))
        behavior_W, target_W = pairs.of_behaviors(ids_M), pairs.of_targets(target_T)
        additive_W = cross_score(
            pairs,
            scoring,
            partial(behavior_row, batch=batch, history=history, behavior_X=behavior_W, target_X=target_W),
            partial(target_row, batch=batch),
            cross[target_set][sequence],
            cross[history_set][sequence],
        )
        _, behavior_TK = top_k(rows_MD, ids_M, history.start_T, history.end_T, query_TD, additive_W, k)
        found[sequence] = Selection(behavior_TK.clamp(min=0), behavior_TK >= 0)
    return found
