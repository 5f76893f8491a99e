"""What a rank does in a step, in numbers: targets, behaviours, pairs, rows to look up.

N = behaviours of a target's window, M = behaviours of all users, K = retrieved ones of a target.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp
from typing import Literal, Self

from embeddings.sizes import DataSizes
from schemas.manifest import Manifest
from schemas.stream import StreamSettings

Search = Literal["shard", "local"]
"""Where behaviours are compared with targets: on the shards of the rows, or on the sample's rank."""


def mean_load(manifest: Manifest, stream: StreamSettings) -> tuple[float, float]:
    """How much work the training split of a data set gives, on the mean over its users.

    All behaviours are counted in every sequence: a manifest does not say which of them belong to which.

    Returns:
        The targets of a batch that share a user's history, and the share of N that a history fills.
    """
    counts = manifest.counts
    longest = max((part.length for part in (stream.sequences or {}).values()), default=stream.history_length)
    # A user's targets of a whole epoch do not share a history if the batches keep them apart.
    together = min(stream.targets_per_user_per_batch or stream.batch_size, stream.batch_size)
    targets_per_user = max(1.0, min(counts.train.targets / max(1, counts.users), together))
    return targets_per_user, max(0.001, min(1.0, counts.behaviors / max(1, counts.users) / longest))


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
    def of(
        cls,
        retrieved: Mapping[str, int],
        sizes: DataSizes,
        ranks: int,
        batch_size: int,
        targets_per_user: float = 1.0,
        filled: float = 1.0,
    ) -> Self:
        """The workload of a rank, at most where the last two arguments are left out.

        Args:
            retrieved: K by sequence.
            sizes: of the data.
            ranks: in all.
            batch_size: targets of a rank.
            targets_per_user: targets of a batch that share a user's history.
            filled: the share of N that a history fills.
        """
        return cls(
            ranks,
            batch_size,
            tuple(
                SequenceWorkload(
                    length=sizes.lengths[name],
                    behaviors=batch_size / targets_per_user * sizes.lengths[name] * filled,
                    pairs=batch_size * sizes.lengths[name] * filled,
                    retrieved=k,
                )
                for name, k in retrieved.items()
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
