"""What a home asks of the shards: its targets, its behaviours and the targets' windows in them, as columns.

M = behaviours (locally: of all users of this rank; on a shard: of all ranks, those whose item rows are there),
T = targets of this rank, G = targets of all ranks, S = shards (one a rank), W = (target, behaviour) pairs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embeddings.batch import Batch, History
from embeddings.distributed.collectives import Column, narrowest
from embeddings.distributed.row_wise import Bucketed
from embeddings.features import behavior_row, interval_bucket, target_row
from embeddings.search.pairs import Pairs
from schemas.model import Feature


@dataclass(frozen=True)
class LocalWindows:
    """At home: where a sequence's behaviours went, and which part of them each window is."""

    place_M: Tensor
    """int32 or int64, the behaviours by shard, each shard's in time order."""
    first_S: Tensor
    """int64, where each shard's begin."""
    start_ST: Tensor
    """int64, counted in ``place_M``: a window is a range of each shard's behaviours."""
    end_ST: Tensor

    @classmethod
    def of(cls, history: History, bucketed: Bucketed) -> "LocalWindows":
        """Of a sequence whose behaviours were bucketed by item."""
        place_M, device = bucketed.place_B, bucketed.place_B.device
        count_S = torch.tensor(bucketed.counts, device=device)
        dtype = narrowest(max(1 << 16, len(count_S) * len(place_M)))  # int32 or int64
        before_S = torch.arange(len(count_S), device=device, dtype=dtype) * len(place_M)
        key_M = place_M + before_S.repeat_interleave(count_S, output_size=len(place_M))
        start_ST, end_ST = (
            torch.searchsorted(key_M, before_S[:, None] + limit_T.to(dtype))
            for limit_T in (history.start_T, history.end_T)
        )
        return cls(place_M, count_S.cumsum(0) - count_S, start_ST, end_ST)


@dataclass(frozen=True)
class ShardTargets:
    """On a shard: the targets of all ranks, one rank's after the other's; the same on all shards."""

    counts: Sequence[int]
    """Targets of each rank."""
    columns: Mapping[Feature, Tensor]
    """int64 (G,): item, category and scene ids; of interval the time."""

    def row(self, feature: Feature) -> Tensor | None:
        """The targets' own rows of a cross feature; `cross_features.target_row` says the same locally."""
        return self.columns[feature] if feature == "scene" else None


@dataclass(frozen=True)
class ShardHistory:
    """On a shard: those behaviours of a sequence whose item rows are there, and the targets' windows in them."""

    columns: Mapping[Feature, Tensor]
    """Integers (M,): of item the local row; category, behavior and scene ids; of position the place, of interval
    the time."""
    start_G: Tensor
    """int64, counted in the shard's M."""
    end_G: Tensor
    """int64"""
    place_G: Tensor
    """int32, the place behind the window's last behaviour, as position counts places."""

    def row(self, feature: Feature, targets: ShardTargets, pairs: Pairs) -> Tensor:
        """Rows of a cross feature, integer (W,); `cross_features.behavior_row` says the same locally."""
        if feature == "position":
            column_W = pairs.of_behaviors(self.columns[feature].to(torch.int32))
            return (pairs.of_targets(self.place_G) - column_W) & _largest(self.columns[feature].dtype)
        if feature == "interval":
            column_W = pairs.of_behaviors(self.columns[feature].long())
            return interval_bucket(pairs.of_targets(targets.columns[feature]) - column_W)
        return pairs.of_behaviors(self.columns[feature].to(torch.int32))


class SearchRequest:
    """Which columns travel, in the narrowest types that hold them.

    Args:
        features: those that the score is made of; item is one of them.
        rows: by feature of whose rows a column is the id: the rows, of item those of one shard.
        items: rows of the item table.
        lengths: N by sequence.
    """

    def __init__(
        self, features: Sequence[Feature], rows: Mapping[Feature, int], items: int, lengths: Mapping[str, int]
    ) -> None:
        self._features, self._rows, self._items, self._lengths = tuple(features), dict(rows), items, dict(lengths)
        self._of_target = [name for name in features if name in ("item", "category", "interval", "scene")]

    def times(self, batch: Batch) -> tuple[int, int]:
        """The earliest behaviour, and the seconds from there to the latest; zeros if no feature needs them."""
        times = [batch.histories[sequence].timestamp_M for sequence in self._lengths]
        if "interval" not in self._features or not any(len(times_M) for times_M in times):
            return 0, 0
        earliest, latest = torch.stack(torch.cat(times).aminmax()).tolist()
        return earliest, latest - earliest

    def target_columns(self, batch: Batch, earliest: int, counts: Sequence[int]) -> list[Column]:
        """The targets, for all shards alike.

        Args:
            batch: of this rank.
            earliest: see `times`.
            counts: targets of each rank.
        """
        found: list[Tensor] = []
        for feature in self._of_target:
            if feature == "interval":
                found.append(batch.timestamp_T - earliest)
            elif feature == "item":
                found.append(batch.item_T.to(narrowest(self._items - 1)))
            else:
                ids_T = batch.category_T if feature == "category" else target_row(feature, batch)
                assert ids_T is not None
                found.append(ids_T.to(narrowest(self._rows[feature] - 1)))
        return [Column(values_T.repeat(len(counts)), [len(batch)] * len(counts), counts) for values_T in found]

    def history_columns(
        self,
        sequence: str,
        batch: Batch,
        bucketed: Bucketed,
        windows: LocalWindows,
        earliest: int,
        span: int,
        behaviors: Sequence[int],
        targets: Sequence[int],
    ) -> list[Column]:
        """A sequence's behaviours, each for the shard of its item, and the windows in each shard's behaviours.

        Args:
            sequence: its name.
            batch: of this rank.
            bucketed: its behaviours by item.
            windows: the same.
            earliest: see `times`.
            span: the longest of all ranks.
            behaviors: that come from each rank.
            targets: of each rank.
        """
        history, place_M = batch.histories[sequence], windows.place_M
        found: list[Tensor] = []
        for feature in self._features:
            if feature == "item":
                found.append(bucketed.row_B.to(narrowest(self._rows[feature] - 1)))
            elif feature == "position":
                found.append(_wrapped(place_M, narrowest(self._lengths[sequence])))
            elif feature == "interval":
                found.append((history.timestamp_M.index_select(0, place_M) - earliest).to(narrowest(span)))
            elif feature == "category":
                found.append(history.category_M.index_select(0, place_M).to(narrowest(self._rows[feature] - 1)))
            else:
                row_M = behavior_row(feature, batch, history, place_M.long(), place_M)
                found.append(row_M.to(narrowest(self._rows[feature] - 1)))
        columns = [Column(values_M, bucketed.counts, behaviors) for values_M in found]
        width = narrowest(self._lengths[sequence])
        start_ST = (windows.start_ST - windows.first_S[:, None]).to(torch.int32)
        length_ST = (windows.end_ST - windows.start_ST).to(width)
        place_ST = _wrapped(history.end_T, width).repeat(len(targets), 1)
        of_windows = [start_ST, length_ST] + [place_ST] * ("position" in self._features)
        return columns + [Column(values.flatten(), [len(batch)] * len(targets), targets) for values in of_windows]

    def targets(self, columns: Iterator[Tensor], counts: Sequence[int]) -> ShardTargets:
        """Take from ``columns`` what `target_columns` has sent."""
        return ShardTargets(counts, {feature: next(columns).long() for feature in self._of_target})

    def history(self, columns: Iterator[Tensor], behaviors: Sequence[int], targets: ShardTargets) -> ShardHistory:
        """Take from ``columns`` what `history_columns` has sent."""
        found = {feature: next(columns) for feature in self._features}
        start_G, length_G = next(columns).long(), next(columns).long()
        device = start_G.device
        count_S = torch.tensor(behaviors, device=device)
        start_G += (count_S.cumsum(0) - count_S).repeat_interleave(torch.tensor(targets.counts, device=device))
        place_G = next(columns).to(torch.int32) if "position" in self._features else start_G
        return ShardHistory(found, start_G, start_G + length_G, place_G)


def _largest(dtype: torch.dtype) -> int:
    return torch.iinfo(dtype).max


def _wrapped(places: Tensor, dtype: torch.dtype) -> Tensor:
    """Places modulo the size of a type that holds any window, so that differences within a window are right."""
    return (places & _largest(dtype)).to(dtype)
