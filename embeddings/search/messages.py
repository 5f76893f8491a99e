"""What the ranks of a search on the shards send to each other: targets, behaviours and windows, as columns.

A rank plays two parts: it has samples to search for ("the sample's rank"), and rows to search in ("a shard").

M = behaviours (on the sample's rank: of all its users; on a shard: of all ranks, those whose item rows are there),
T = targets of this rank, G = targets of all ranks, S = shards (one a rank), W = (target, behaviour) pairs, K = kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from embeddings.batch import Batch, History
from embeddings.distributed.collectives import Column, narrowest
from embeddings.distributed.row_wise import Bucketed
from embeddings.features import behavior_row, interval_bucket, target_row
from embeddings.search.pairs import Pairs
from embeddings.sizes import DataSizes
from schemas.model import Feature

TARGET_FEATURES: frozenset[Feature] = frozenset({"item", "category", "interval", "scene"})
"""Features of which a target sends a value of its own; of the others it has row 0."""


@dataclass(frozen=True)
class LocalWindows:
    """On the sample's rank: where a sequence's behaviours go, and which part of them each window is on each shard."""

    behaviors: Bucketed
    """The behaviours sorted by shard; each shard's are in time order."""
    first_S: Tensor
    """int64: which of the bucketed behaviours is the first of each shard."""
    start_ST: Tensor
    """int64, counted in the bucketed behaviours: on each shard a window is one range of them."""
    end_ST: Tensor
    """int64: where that range ends."""

    @classmethod
    def of(cls, history: History, behaviors: Bucketed) -> Self:
        """Find the windows of ``history`` in its behaviours, which were bucketed by item."""
        index_M, device = behaviors.index_B, behaviors.index_B.device
        # An item decides the shard of its behaviour, so a window falls apart into one range on each shard.
        count_S = torch.tensor(behaviors.counts, device=device)
        # A shard's behaviours keep their order, so (shard, index) ascends, and a search in it finds where each window
        # begins and ends on each shard. 32 bits are enough for small batches, and sort in half the time.
        dtype = narrowest(max(1 << 16, len(count_S) * len(index_M)))  # int32 or int64
        shard_S = torch.arange(len(count_S), device=device, dtype=dtype) * len(index_M)
        key_M = index_M + shard_S.repeat_interleave(count_S, output_size=len(index_M))
        start_ST, end_ST = (
            torch.searchsorted(key_M, shard_S[:, None] + limit_T.to(dtype))
            for limit_T in (history.start_T, history.end_T)
        )
        return cls(behaviors, count_S.cumsum(0) - count_S, start_ST, end_ST)

    @property
    def length_ST(self) -> Tensor:
        """int64: behaviours of each window on each shard."""
        return self.end_ST - self.start_ST

    def index_of(self, count_ST: Tensor, local_index_F: Tensor) -> Tensor:
        """Which of the rank's M behaviours the shards have selected, int64 (F,).

        Args:
            count_ST: int64, how many each shard has selected for each target.
            local_index_F: integer, counted in the part of the window that is on the shard.
        """
        # A shard counts from the start of its part of the window, which this rank knows: so small numbers travel, and
        # no index of the batch.
        first_F = self.start_ST.flatten().repeat_interleave(count_ST.flatten())
        return self.behaviors.index_B.index_select(0, first_F + local_index_F.long()).long()

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that ``stream`` uses the tensors."""
        for tensor in (self.behaviors.row_B, self.behaviors.index_B, self.first_S, self.start_ST, self.end_ST):
            tensor.record_stream(stream)


@dataclass(frozen=True)
class SearchSizes:
    """How much travels in a search; known to this rank when all ranks have said how much they send."""

    targets: Sequence[int]
    """Targets of each rank."""
    behaviors: Mapping[str, Sequence[int]]
    """By sequence, the behaviours that each rank sends to this shard."""
    span: int
    """Seconds between the earliest and the latest behaviour of a batch, the longest of all ranks."""


@dataclass(frozen=True)
class ShardTargets:
    """On a shard: the targets of all ranks, one rank's after the other's; all shards have the same."""

    columns: Mapping[Feature, Tensor]
    """int64 (G,): item, category and scene ids; for interval the time of the target."""

    def row(self, feature: Feature) -> Tensor | None:
        """The targets' own rows of a cross feature, or None; `embeddings.features.target_row` on a shard."""
        return self.columns[feature] if feature == "scene" else None


@dataclass(frozen=True)
class ShardHistory:
    """On a shard: those behaviours of a sequence whose item rows are there, and the targets' windows in them."""

    columns: Mapping[Feature, Tensor]
    """Integers (M,): for item the local row, for category, behavior and scene the id, for position the index in the
    user's rank's batch, for interval the time."""
    start_G: Tensor
    """int64, counted in the shard's M."""
    end_G: Tensor
    """int64, counted in the shard's M."""
    end_index_G: Tensor
    """int32: the index behind the window's last behaviour, counted as the column of position counts."""

    def row(self, feature: Feature, targets: ShardTargets, pairs: Pairs) -> Tensor:
        """Rows of a cross feature, integer (W,); `embeddings.features.behavior_row` on a shard."""
        if feature == "position":
            index_W = pairs.of_behaviors(self.columns[feature].to(torch.int32))
            # Both are modulo a power of 2 above N, and so is their difference.
            return (pairs.of_targets(self.end_index_G) - index_W) & _largest(self.columns[feature].dtype)
        if feature == "interval":
            time_W = pairs.of_behaviors(self.columns[feature].long())
            return interval_bucket(pairs.of_targets(targets.columns[feature]) - time_W)
        return pairs.of_behaviors(self.columns[feature].to(torch.int32))


@dataclass(frozen=True)
class ShardInput:
    """All that a shard receives for one search."""

    targets: ShardTargets
    histories: Mapping[str, ShardHistory]
    """By sequence."""

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that ``stream`` uses the tensors."""
        for history in self.histories.values():
            for tensor in (*history.columns.values(), history.start_G, history.end_G, history.end_index_G):
                tensor.record_stream(stream)
        for tensor in self.targets.columns.values():
            tensor.record_stream(stream)


class SearchMessages:
    """Packs what a shard needs into columns, in the narrowest types that hold the values, and unpacks it there.

    Args:
        features: those that the score is made of; item is one of them.
        shard_rows: item rows of a shard.
        sizes: of the data, which decide the types.
    """

    def __init__(self, features: Sequence[Feature], shard_rows: int, sizes: DataSizes) -> None:
        self._features, self._shard_rows, self._sizes = tuple(features), shard_rows, sizes
        self._target_features = [feature for feature in features if feature in TARGET_FEATURES]

    def times(self, batch: Batch) -> tuple[int, int]:
        """The earliest behaviour's time, and the seconds from there to the latest; zeros if no feature needs them."""
        times = [batch.histories[sequence].timestamp_M for sequence in self._sizes.lengths]
        if "interval" not in self._features or not any(len(times_M) for times_M in times):
            return 0, 0
        # Seconds since 1970 need 8 bytes, those since the batch's earliest behaviour 4 for up to 68 years.
        earliest, latest = torch.stack(torch.cat(times).aminmax()).tolist()
        return earliest, latest - earliest

    def target_columns(self, batch: Batch, earliest: int, targets: Sequence[int]) -> list[Column]:
        """Pack the targets, which all shards get alike.

        Args:
            batch: of this rank.
            earliest: what times count from, see `times`.
            targets: of each rank.
        """
        packed: list[Tensor] = []
        for feature in self._target_features:
            if feature == "interval":
                packed.append(batch.timestamp_T - earliest)
            elif feature == "item":
                packed.append(batch.item_T.to(self._id_type(feature)))
            elif feature == "category":
                packed.append(batch.category_T.to(self._id_type(feature)))
            else:
                row_T = target_row(feature, batch)
                assert row_T is not None
                packed.append(row_T.to(self._id_type(feature)))
        return [Column(values_T.repeat(len(targets)), [len(batch)] * len(targets), targets) for values_T in packed]

    def history_columns(
        self, sequence: str, batch: Batch, windows: LocalWindows, earliest: int, sizes: SearchSizes
    ) -> list[Column]:
        """Pack a sequence's behaviours, each for the shard of its item, and the windows in each shard's behaviours.

        Args:
            sequence: its name.
            batch: of this rank.
            windows: of the sequence.
            earliest: what times count from, see `times`.
            sizes: of the search.
        """
        history, index_M = batch.histories[sequence], windows.behaviors.index_B
        # A type that holds N holds any two indices of a window modulo its size.
        index_type = narrowest(self._sizes.lengths[sequence])
        packed: list[Tensor] = []
        for feature in self._features:
            if feature == "item":
                packed.append(windows.behaviors.row_B.to(narrowest(self._shard_rows - 1)))
            elif feature == "position":
                packed.append(_modulo(index_M, index_type))
            elif feature == "interval":
                # The longest span of all ranks decides the type: a shard unpacks what all of them have sent as one
                # column.
                packed.append((history.timestamp_M.index_select(0, index_M) - earliest).to(narrowest(sizes.span)))
            elif feature == "category":
                packed.append(history.category_M.index_select(0, index_M).to(self._id_type(feature)))
            else:
                row_M = behavior_row(feature, batch, history, index_M.long(), index_M)
                packed.append(row_M.to(self._id_type(feature)))
        targets = sizes.targets
        columns = [Column(values_M, windows.behaviors.counts, sizes.behaviors[sequence]) for values_M in packed]
        # A shard sees this rank's behaviours from the first of those that it gets. A window travels as start and
        # length, for the length fits the narrow type that N has.
        start_ST = (windows.start_ST - windows.first_S[:, None]).to(torch.int32)
        length_ST = windows.length_ST.to(index_type)
        # Position is counted back from the end of the target's window in the whole history, not from its end on this
        # shard.
        end_index_ST = _modulo(history.end_T, index_type).repeat(len(targets), 1)
        window_columns = [start_ST, length_ST] + [end_index_ST] * ("position" in self._features)
        return columns + [Column(values.flatten(), [len(batch)] * len(targets), targets) for values in window_columns]

    def unpack(self, columns: Sequence[Tensor], sizes: SearchSizes) -> ShardInput:
        """Make the shard's input of the columns that have come: the targets' first, then each sequence's."""
        rest = iter(columns)
        # In the order in which `target_columns` and `history_columns` have packed them, and widened for torch to
        # compute with.
        targets = ShardTargets({feature: next(rest).long() for feature in self._target_features})
        histories = {}
        for sequence, behaviors in sizes.behaviors.items():
            by_feature = {feature: next(rest) for feature in self._features}
            start_G, length_G = next(rest).long(), next(rest).long()
            device = start_G.device
            # Windows came counted within their rank's behaviours, which here lie one rank's after the other's.
            count_S = torch.tensor(behaviors, device=device)
            target_counts = torch.tensor(sizes.targets, device=device)
            start_G += (count_S.cumsum(0) - count_S).repeat_interleave(target_counts)
            # Without position no one reads it.
            end_index_G = next(rest).to(torch.int32) if "position" in self._features else start_G
            histories[sequence] = ShardHistory(by_feature, start_G, start_G + length_G, end_index_G)
        return ShardInput(targets, histories)

    def _id_type(self, feature: Feature) -> torch.dtype:
        # By the rows of the table and not by the ids of the batch, so that all ranks choose the same type.
        return narrowest(self._sizes.rows(feature) - 1)


def _largest(dtype: torch.dtype) -> int:
    return torch.iinfo(dtype).max


def _modulo(indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Indices modulo the size of a type that holds N, so that differences within a window are right."""
    # The largest values of these types are 2^n - 1, so the mask keeps n bits. N fits the type and so does every
    # position.
    return (indices & _largest(dtype)).to(dtype)
