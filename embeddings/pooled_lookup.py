"""One differentiable lookup of targets and of their pooled histories, pooled on the shards.

T = targets, K = behaviours chosen of each, D = dim of the inherent features together, I = ids in all bags.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from embeddings.batch import Batch
from embeddings.cross_features import selected_rows, target_rows
from embeddings.representation import Representation, weighted_sum
from embeddings.rows import Rows
from embeddings.search.selection import Selection, taken
from embeddings.tables import CrossRows, Tables
from schemas.model import Feature


def pooled_on_shards(
    batch: Batch,
    tables: Tables,
    name: str,
    cross: CrossRows,
    selected: Mapping[str, Selection],
    weights: Mapping[str, Tensor],
) -> dict[str, Representation]:
    """What the representation rows say of targets and histories; one bag for each target and for each history.

    Targets and histories share the lookup, so that the tables' optimizers see one gradient of each row a step.

    Args:
        batch: the targets and their histories.
        tables: where the rows are.
        name: the set of tables, sharded row-wise.
        cross: all rows of its cross tables.
        selected: by sequence, the behaviours.
        weights: by sequence, float32 (T, K), with gradient; 0 where there is no behaviour.

    Returns:
        By sequence.
    """
    item, category = [batch.item_T], [batch.category_T]
    weight, length = [torch.ones(len(batch), device=batch.item_T.device)], [torch.ones_like(batch.item_T)]
    for sequence, chosen in selected.items():
        history = batch.histories[sequence]
        item.append(taken(history.item_M, chosen.behavior_TK)[chosen.valid_TK])
        category.append(taken(history.category_M, chosen.behavior_TK)[chosen.valid_TK])
        weight.append(weights[sequence][chosen.valid_TK])
        length.append(chosen.valid_TK.sum(1))
    ids: dict[Feature, Tensor] = {"item": torch.cat(item), "category": torch.cat(category)}
    target_TD, *pooled = tables.pooled_rows(name, ids, torch.cat(weight), torch.cat(length)).split(
        [len(batch)] * len(length)
    )
    found = {}
    for (sequence, chosen), pooled_TD in zip(selected.items(), pooled, strict=True):
        rows = selected_rows(batch, batch.histories[sequence], chosen, cross[sequence])
        pooled_cross = {feature: weighted_sum(weights[sequence], rows_TKd) for feature, rows_TKd in rows.items()}
        found[sequence] = Representation(
            Rows(target_TD, target_rows(batch, cross[sequence])), Rows(pooled_TD, pooled_cross)
        )
    return found
