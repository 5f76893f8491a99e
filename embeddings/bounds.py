"""Whether a batch stays within the tables of a model.

T = targets, M = behaviours of all users.
"""

import torch
from torch import Tensor

from embeddings.batch import Batch
from embeddings.sizes import DataSizes
from schemas.model import INHERENT


def check_bounds(batch: Batch, sizes: DataSizes) -> None:
    """Refuse what would otherwise be read from outside of a table; one transfer from the device.

    Raises:
        ValueError: the batch lacks a sequence, has an item or a category that the tables do not have, or a window
            longer than N.
    """
    for sequence in sizes.lengths:
        if sequence not in batch.histories:
            raise ValueError(
                f"model.retrieved.{sequence}: not a sequence of {batch.origin}; it has {', '.join(batch.histories)}"
            )
    histories = {sequence: batch.histories[sequence] for sequence in sizes.lengths}
    checked = [
        [batch.item_T, *(history.item_M for history in histories.values())],
        [batch.category_T, *(history.category_M for history in histories.values())],
        *([history.end_T - history.start_T] for history in histories.values()),
    ]
    extremes = torch.stack([_extremes(values) for values in checked]).tolist()
    for feature, (low, high) in zip(INHERENT, extremes, strict=False):
        rows = sizes.rows(feature)
        if low < 0 or high >= rows:
            wrong = low if low < 0 else high
            raise ValueError(f"{batch.origin}: {feature} {wrong}, but the {feature} tables have {rows} rows")
    for (sequence, allowed), (_, longest) in zip(sizes.lengths.items(), extremes[len(INHERENT) :], strict=True):
        if longest > allowed:
            raise ValueError(
                f"{batch.origin}: a history of {longest} behaviours in {sequence}; the model was built for {allowed}"
            )


def _extremes(values: list[Tensor]) -> Tensor:
    """The least and the greatest of all values and 0, int64 (2,)."""
    each = [torch.stack(part.aminmax()).long() for part in values if len(part)]
    zero = values[0].new_zeros(2, dtype=torch.int64)
    both = torch.stack([zero, *each])
    return torch.stack([both[:, 0].min(), both[:, 1].max()])
