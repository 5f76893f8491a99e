"""Settings of the stream: how shards become batches."""

from typing import Annotated, Literal

from pydantic import ByteSize, Field, PositiveInt

from schemas.settings import Settings

Length = Annotated[int, Field(gt=0, le=10_000_000)]
"""N: how many behaviours a target sees at most."""
Names = Annotated[tuple[str, ...], Field(min_length=1)]


class HistorySequence(Settings):
    """A sequence cut out of a user's history; with both conditions, behaviours must meet both."""

    length: Length
    """N: a target sees the last N of these behaviours before it."""
    behavior: Names | None = None
    """Behaviour types that belong to it, by name; None: all."""
    scene: Names | None = None
    """Scenes that belong to it, by name; None: all."""


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
