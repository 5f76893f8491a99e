"""What a rank does in a step, in numbers: so many targets, behaviours, pairs, rows to look up."""

from dataclasses import dataclass
from typing import Literal, Self

from embeddings.sizes import DataSizes
from schemas.plan import PlanSettings

Search = Literal["shard", "home"]


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
    def winner_bags(self) -> int:
        """Bags of the lookup with gradient: targets and what was retrieved."""
        return self.targets * (1 + self.retrieved) + 1

    @property
    def pooled_bags(self) -> int:
        """Bags of the pooling on shards: targets, and a history of each sequence."""
        return self.targets * (1 + len(self.sequences)) + 1

    @property
    def kept(self) -> float:
        """Behaviours that were retrieved, of all targets."""
        return sum(min(self.targets * sequence.retrieved, sequence.pairs) for sequence in self.sequences)

    @property
    def history_bags(self) -> int:
        """Bags of the lookup of search at home: targets and all behaviours."""
        return self.targets + round(self.behaviors) + 1
