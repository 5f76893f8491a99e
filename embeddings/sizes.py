"""Sizes of the data, which decide the shapes of a model, and whether a batch stays within them.

N = longest window of a sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from embeddings.batch import Batch
from embeddings.features import INTERVAL_BUCKETS
from schemas.errors import UserError
from schemas.manifest import Manifest
from schemas.model import INHERENT, Feature
from schemas.stream import StreamSettings


@dataclass(frozen=True)
class DataSizes:
    """Numbers of distinct ids, the unknown id 0 not counted, and the lengths of the sequences."""

    items: int
    categories: int
    lengths: Mapping[str, int]
    """N by sequence."""
    behaviors: int | None = None
    """None: the data has no behaviour types."""
    scenes: int | None = None
    """None: the data has no scenes."""

    @classmethod
    def of(cls, manifest: Manifest, stream: StreamSettings) -> Self:
        """Read the sizes of a prepared data set off its manifest and the settings of its stream."""
        sequences = stream.sequences
        return cls(
            items=manifest.counts.items,
            categories=manifest.counts.categories,
            lengths={name: sequence.length for name, sequence in sequences.items()}
            if sequences
            else {"history": stream.history_length},
            behaviors=None if manifest.behaviors is None else len(manifest.behaviors),
            scenes=None if manifest.scenes is None else len(manifest.scenes),
        )

    def rows(self, feature: Feature, sequence: str | None = None) -> int:
        """Rows of a table of ``feature``, row 0 included; position needs to know the ``sequence``.

        Raises:
            UserError: the data does not have the feature.
        """
        counts: dict[Feature, int | None] = {
            "item": self.items,
            "category": self.categories,
            "position": self.lengths.get(sequence or ""),
            # Like the others a count without row 0, which is added below.
            "interval": INTERVAL_BUCKETS - 1,
            "behavior": self.behaviors,
            "scene": self.scenes,
        }
        count = counts[feature]
        if count is None:
            raise UserError(f"model.features: {feature} is not in this data set; it was prepared without that column")
        return count + 1


def check_bounds(batch: Batch, sizes: DataSizes) -> None:
    """Refuse a batch that would read from outside of a table; on a GPU this costs one transfer to the host.

    Raises:
        UserError: the batch lacks a sequence, has an item or a category that the tables do not have, or a window
            longer than N.
    """
    for sequence in sizes.lengths:
        if sequence not in batch.histories:
            raise UserError(
                f"model.retrieved.{sequence}: not a sequence of {batch.origin}; it has {', '.join(batch.histories)}"
            )
    histories = {sequence: batch.histories[sequence] for sequence in sizes.lengths}
    checked = [
        [batch.item_T, *(history.item_M for history in histories.values())],
        [batch.category_T, *(history.category_M for history in histories.values())],
        *([history.end_T - history.start_T] for history in histories.values()),
    ]
    # All figures in one tensor: a GPU is waited for once. FBGEMM would refuse a wrong id too, but could not say which
    # batch it is of.
    extremes = torch.stack([_extremes(values) for values in checked]).tolist()
    for feature, (low, high) in zip(INHERENT, extremes, strict=False):
        rows = sizes.rows(feature)
        if low < 0 or high >= rows:
            wrong = low if low < 0 else high
            raise UserError(f"{batch.origin}: {feature} {wrong}, but the {feature} tables have {rows} rows")
    for (sequence, allowed), (_, longest) in zip(sizes.lengths.items(), extremes[len(INHERENT) :], strict=True):
        if longest > allowed:
            raise UserError(
                f"{batch.origin}: a history of {longest} behaviours in {sequence}; the model was built for {allowed}"
            )


def _extremes(values: list[Tensor]) -> Tensor:
    """The least and the greatest of all values and of 0, int64 (2,)."""
    # `aminmax` of nothing is an error; with the 0 there is always a value, and it is within every table.
    each = [torch.stack(part.aminmax()).long() for part in values if len(part)]
    zero = values[0].new_zeros(2, dtype=torch.int64)
    both = torch.stack([zero, *each])
    return torch.stack([both[:, 0].min(), both[:, 1].max()])
