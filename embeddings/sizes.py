"""Sizes of the data, which decide the shapes of a model, and whether a batch stays within them.

N = longest window of a sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from embeddings.batch import Batch
from embeddings.intervals import INTERVAL_BUCKETS
from schemas.errors import UserError
from schemas.manifest import Manifest
from schemas.model import Feature
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
        UserError: the batch lacks a sequence, has ids that the tables do not have, or a window that is longer than N or
            outside of its behaviours.
    """
    check_extremes(extremes(batch, sizes).tolist(), batch.origin, sizes)


def extremes(batch: Batch, sizes: DataSizes) -> Tensor:
    """The least and the greatest of all that points into something, int64 (X,), for `check_extremes`.

    FBGEMM would refuse a wrong id too, but could not say which batch it is of, and a search would read foreign memory.

    Raises:
        UserError: the batch lacks a sequence.
    """
    for sequence in sizes.lengths:
        if sequence not in batch.histories:
            raise UserError(
                f"model.retrieved.{sequence}: not a sequence of {batch.origin}; it has {', '.join(batch.histories)}"
            )
    checked = [values for _, values in _id_columns(batch, sizes)]
    for sequence in sizes.lengths:
        history = batch.histories[sequence]
        checked += [history.end_T - history.start_T, history.start_T, len(history.item_M) - history.end_T]
    # All figures in one tensor: a GPU is waited for once. `aminmax` of nothing is an error, and 0 is within all bounds.
    zero = batch.timestamp_T.new_zeros(())
    pairs = [values.aminmax() if len(values) else (zero, zero) for values in checked]
    return torch.stack([extreme.long() for pair in pairs for extreme in pair])


def check_extremes(figures: list[int], origin: str, sizes: DataSizes) -> None:
    """Refuse a batch by its `extremes`.

    Args:
        figures: the extremes, as numbers.
        origin: what to call the batch.
        sizes: of the data.

    Raises:
        UserError: it has ids that the tables do not have, or a window that is longer than N or outside of its
            behaviours.
    """
    pairs = list(zip(figures[::2], figures[1::2], strict=True))
    features = _id_features(sizes)
    for feature, (low, high) in zip(features, pairs, strict=False):
        rows = sizes.rows(feature)
        if low < 0 or high >= rows:
            wrong = low if low < 0 else high
            raise UserError(f"{origin}: {feature} {wrong}, but the {feature} tables have {rows} rows")
    windows = pairs[len(features) :]
    for number, (sequence, allowed) in enumerate(sizes.lengths.items()):
        (shortest, longest), (first, _), (behind, _) = windows[3 * number : 3 * number + 3]
        if longest > allowed:
            raise UserError(
                f"{origin}: a history of {longest} behaviours in {sequence}; the model was built for {allowed}"
            )
        if shortest < 0 or first < 0 or behind < 0:
            raise UserError(f"{origin}: a window of {sequence} is outside of its behaviours")


def _id_features(sizes: DataSizes) -> list[Feature]:
    """The feature of each column of ids that is checked."""
    features: list[Feature] = ["item", "category"]
    behaviors: list[Feature] = ["behavior"] * (sizes.behaviors is not None)
    scenes: list[Feature] = ["scene"] * (sizes.scenes is not None)
    for _ in sizes.lengths:
        features += ["item", "category"]
        features += behaviors + scenes
    return features + scenes


def _id_columns(batch: Batch, sizes: DataSizes) -> list[tuple[Feature, Tensor]]:
    columns: list[Tensor | None] = [batch.item_T, batch.features_T.get("category")]
    for sequence in sizes.lengths:
        history = batch.histories[sequence]
        columns += [history.item_M, history.features_M.get("category")]
        columns += [history.features_M.get("behavior")] * (sizes.behaviors is not None)
        columns += [history.features_M.get("scene")] * (sizes.scenes is not None)
    columns += [batch.features_T.get("scene")] * (sizes.scenes is not None)
    # A batch may lack a column that no feature needs.
    nothing = batch.item_T[:0]
    features = _id_features(sizes)
    return [(feature, nothing if ids is None else ids) for feature, ids in zip(features, columns, strict=True)]
