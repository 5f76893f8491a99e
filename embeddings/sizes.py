"""What of the data decides the shapes of a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from embeddings.interval import INTERVAL_BUCKETS
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
        """Sizes of a prepared data set, streamed with the settings ``stream``."""
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
            ValueError: the data does not have the feature.
        """
        counts: dict[Feature, int | None] = {
            "item": self.items,
            "category": self.categories,
            "position": self.lengths.get(sequence or ""),
            "interval": INTERVAL_BUCKETS - 1,
            "behavior": self.behaviors,
            "scene": self.scenes,
        }
        count = counts[feature]
        if count is None:
            raise ValueError(f"model.features: {feature} is not in this data set; it was prepared without that column")
        return count + 1
