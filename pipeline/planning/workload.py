"""What a rank does in a step, in numbers: targets, behaviours, pairs, rows to look up.

N = behaviours of a target's window, M = behaviours of all users, K = retrieved ones of a target.
"""

from dataclasses import dataclass
from math import exp
from typing import Literal, Self

from embeddings.sizes import DataSizes
from schemas.manifest import Manifest
from schemas.plan import PlanSettings

Search = Literal["shard", "local"]
"""Where behaviours are compared with targets: on the shards of the rows, or on the sample's rank."""


def with_load_of(settings: PlanSettings, manifest: Manifest) -> PlanSettings:
    """Settings with the workload of a data set's training split; what the settings say themselves stays.

    Its figures are means over users, and all behaviours are counted in every sequence: a manifest knows no more.

    Args:
        settings: of the dry run.
        manifest: of the data set.
    """
    counts, stream, load = manifest.counts, settings.stream, settings.workload
    # The longest sequence, because a manifest does not say which behaviours belong to which.
    longest = max((part.length for part in (stream.sequences or {}).values()), default=stream.history_length)
    # A user's targets of a whole epoch do not share a history if the batches keep them apart.
    together = min(stream.targets_per_user_per_batch or stream.batch_size, stream.batch_size)
    measured = {
        "targets_per_user": max(1.0, min(counts.train.targets / max(1, counts.users), together)),
        "filled": max(0.001, min(1.0, counts.behaviors / max(1, counts.users) / longest)),
    }
    own = {name: value for name, value in measured.items() if name not in load.model_fields_set}
    return settings.model_copy(update={"workload": load.model_copy(update=own)})


@dataclass(frozen=True)
class SequenceWorkload:
    """What a rank does in a step for one sequence; means, so not whole numbers."""

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
    """What a rank does in a step; means, so not whole numbers."""

    ranks: int
    targets: int
    sequences: tuple[SequenceWorkload, ...]

    @classmethod
    def of(cls, settings: PlanSettings, sizes: DataSizes) -> Self:
        """The workload that settings ask of a rank.

        Args:
            settings: of the dry run.
            sizes: of the data.
        """
        targets, load = settings.stream.batch_size, settings.workload
        return cls(
            settings.cluster.ranks,
            targets,
            tuple(
                SequenceWorkload(
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
        """Retrieved behaviours of all targets; one that two targets have retrieved counts twice."""
        return sum(min(self.targets * sequence.retrieved, sequence.pairs) for sequence in self.sequences)

    @property
    def selected(self) -> float:
        """Different retrieved behaviours; one that several targets of a user have retrieved counts once."""
        return sum(
            distinct(min(self.targets * sequence.retrieved, sequence.pairs), sequence.behaviors)
            for sequence in self.sequences
        )

    @property
    def parts(self) -> float:
        """Sums that shards send back in a pooling on shards: for each bag, the number of shards that have an id of it.

        The bags are the targets, of one id each, and each target's sequences, of K ids at most.
        """
        # A bag's ids are even over the shards: one is left out by all of them with probability (1 - 1/W)^ids.
        held = (min(sequence.retrieved, sequence.pairs / self.targets) for sequence in self.sequences)
        touched: list[float] = [self.ranks * (1 - (1 - 1 / self.ranks) ** ids) for ids in held]
        return self.targets * (1 + sum(touched))


def distinct(ids: float, rows: float) -> float:
    """Expected number of different rows among ``ids`` ids that are drawn evenly from ``rows`` rows.

    A row is left out with probability (1 - 1 / rows)^ids, which is close to exp(-ids / rows).
    """
    return rows * (1 - exp(-ids / rows)) if rows else 0.0
