"""Settings of the stream: how shards become batches."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import ByteSize, Field, PositiveInt, field_validator, model_validator

from schemas.settings import Settings

Length = Annotated[int, Field(gt=0, le=10_000_000)]
"""N: how many behaviours a target sees at most."""
Names = Annotated[tuple[str, ...], Field(min_length=1)]
Values = Annotated[tuple[str | int, ...], Field(min_length=1)]
"""Raw values of a feature; integers may be written as such or as text."""
ONLY_SEQUENCE = "history"
"""Name of the sequence where the settings cut none."""


class HistorySequence(Settings):
    """A sequence cut out of a user's history; with several conditions, behaviours must meet all of them."""

    length: Length
    """N: a target sees the last N of these behaviours before it."""
    behavior: Names | None = None
    """Behaviour types that belong to it, by name; None: all."""
    scene: Names | None = None
    """Scenes that belong to it, by name; None: all."""
    where: Annotated[dict[str, Values], Field(min_length=1)] | None = None
    """Values that belong to it, by name of each feature of behaviours that matters; None: all. Of a number that is cut
    into quantiles, the numbers of these, from 1; of several values, one is enough."""

    @field_validator("where", mode="before")
    @classmethod
    def _truth_is_a_word(cls, value: object) -> object:
        """Take true and false for the words that raw values of such a column are."""
        if not isinstance(value, Mapping):
            return value
        return {
            name: [str(each).lower() if isinstance(each, bool) else each for each in values]
            if isinstance(values, list | tuple)
            else values
            for name, values in value.items()
        }

    @model_validator(mode="after")
    def _names_each_feature_once(self) -> Self:
        twice = [name for name in ("behavior", "scene") if getattr(self, name) and name in (self.where or {})]
        if twice:
            raise ValueError(f"{twice[0]} stands in where as well; leave one of the two out")
        return self

    @property
    def conditions(self) -> dict[str, tuple[str, tuple[str | int, ...]]]:
        """By the name of each feature with a condition, the key that it is set by and the values that belong."""
        former = {"behavior": self.behavior, "scene": self.scene}
        named = {name: (name, values) for name, values in former.items() if values is not None}
        return named | {name: (f"where.{name}", values) for name, values in (self.where or {}).items()}


class NegativeSettings(Settings):
    """Negatives that are drawn anew in each epoch, in the place of those that the data set has stored."""

    per_positive: Annotated[int, Field(ge=1, le=10_000)] = 2
    draw: Literal["frequency", "uniform"] = "frequency"
    """In proportion to how often an item stands in the events, or all items alike; never an item of the user's."""


class StreamSettings(Settings):
    """How shards become batches. ``threads`` and ``prefetch_batches`` change the speed alone, never a batch."""

    batch_size: Annotated[int, Field(gt=0, le=2**24)] = 2048
    """Targets in a batch of one rank."""
    history_length: Length = 200
    """N: a target sees the last N behaviours before it. ``sequences`` have lengths of their own."""
    sequences: Annotated[dict[str, HistorySequence], Field(min_length=1)] | None = None
    """Name -> sequence, where a model reads several out of one history; None: one named ``history``, of everything."""
    negatives: NegativeSettings | None = None
    """Draw the negatives of training anew in each epoch; None: those that were stored. Validation and test keep
    theirs."""
    targets_per_user_per_batch: PositiveInt | None = None
    """Spread a user's targets: at most so many in a batch, while other users of the buffer fill it. None: together."""
    shuffle_memory: ByteSize = Field(ByteSize(512 << 20), ge=0, lt=2**63)
    """Memory of the shuffle buffer: a third of it, at least one row group, is shuffled while the next third is read."""
    threads: Annotated[int, Field(gt=0, le=1024)] = 2
    """Threads that read and decode row groups."""
    prefetch_batches: Annotated[int, Field(gt=0, le=4096)] = 4
    """Batches that are made ahead of the consumer."""
