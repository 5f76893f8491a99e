"""What a rank does in a step, in numbers: so many targets, behaviours, pairs, rows to look up."""

from dataclasses import dataclass
from math import exp
from typing import Literal, Self

from embeddings.sizes import DataSizes
from schemas.manifest import Manifest
from schemas.plan import PlanSettings

Search = Literal["shard", "local"]


def with_load_of(settings: PlanSettings, manifest: Manifest) -> PlanSettings:
    """Settings whose workload is that of a data set's training split, but for what they set themselves.

    Means over users, all behaviours counted in every sequence: the manifest knows no more.
    """
    counts, stream, load = manifest.counts, settings.stream, settings.workload
    longest = max((part.length for part in (stream.sequences or {}).values()), default=stream.history_length)
    together = min(stream.targets_per_user_per_batch or stream.batch_size, stream.batch_size)
    found = {
        "targets_per_user": max(1.0, min(counts.train.targets / max(1, counts.users), together)),
        "filled": max(0.001, min(1.0, counts.behaviors / max(1, counts.users) / longest)),
    }
    own = {name: value for name, value in found.items() if name not in load.model_fields_set}
    return settings.model_copy(update={"workload": load.model_copy(update=own)})


@dataclass(frozen=True)
class Sequence:
    """Of one sequence, on one rank."""

    length: int
    """N."""
    behaviors: float
    """M: behaviours of all users, each once."""
    pairs: float
    """(target, behaviour) pairs."""
    retrieved: int
    """K."""


@dataclass(frozen=True)
class Workload:
    """Of one rank in a step; means, so not whole numbers."""

    ranks: int
    targets: int
    sequences: tuple[Sequence, ...]

    @classmethod
    def of(cls, settings: PlanSettings, sizes: DataSizes) -> Self:
        """What the settings ask of a rank."""
        targets, load = settings.stream.batch_size, settings.workload
        return cls(
            settings.cluster.ranks,
            targets,
            tuple(
                Sequence(
                    length=sizes.lengths[name],
                    behaviors=targets / load.targets_per_user * sizes.lengths[name] * load.filled,
                    pairs=targets * sizes.lengths[name] * load.filled,
                    retrieved=k,
                )
                for name, k in settings.model.retrieved.items()
            ),
        )

    @property
    def behaviors(self) -> float:
        """M of all sequences."""
        return sum(sequence.behaviors for sequence in self.sequences)

    @property
    def pairs(self) -> float:
        """(target, behaviour) pairs of all sequences."""
        return sum(sequence.pairs for sequence in self.sequences)

    @property
    def retrieved(self) -> int:
        """K of all sequences."""
        return sum(sequence.retrieved for sequence in self.sequences)

    @property
    def kept(self) -> float:
        """Behaviours that were retrieved, of all targets."""
        return sum(min(self.targets * sequence.retrieved, sequence.pairs) for sequence in self.sequences)

    @property
    def selected(self) -> float:
        """The same, but those that targets of a user share are counted once."""
        return sum(
            distinct(min(self.targets * sequence.retrieved, sequence.pairs), sequence.behaviors)
            for sequence in self.sequences
        )

    @property
    def parts(self) -> float:
        """Shards that have an id of a bag, of all bags of the pooling on shards: targets, and each one's histories."""
        held = (min(sequence.retrieved, sequence.pairs / self.targets) for sequence in self.sequences)
        return self.targets * (1.0 + sum(self.ranks * float(1 - (1 - 1 / self.ranks) ** ids) for ids in held))


def distinct(ids: float, rows: float) -> float:
    """How many different rows so many ids are, on the mean, where each row is as likely."""
    return rows * (1 - exp(-ids / rows)) if rows else 0.0
