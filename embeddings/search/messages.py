"""What the ranks of a search on the shards send to each other: behaviours, targets and windows, packed into words.

A rank plays two parts: it has samples to search for ("the sample's rank"), and rows to search in ("a shard").

M = behaviours (on the sample's rank: of all its users; on a shard: of all ranks, those whose item rows are there),
T = targets of this rank, G = targets of all ranks, S = shards (one a rank), K = kept, X = any number of records,
w = 32-bit words of a record.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from embeddings.batch import Batch, History
from embeddings.distributed.row_wise import Bucketed
from embeddings.search.score_parts import PairRows, pair_rows
from embeddings.search.topk.inputs import PartKind
from embeddings.sizes import DataSizes
from schemas.model import Feature

WORD_BITS = 32
LONG_BITS = 31
"""Bits of the lower half of a value that may not fit into a word; the upper half has as many."""


class Record:
    """A record of whole numbers, packed into 32-bit words: each field has just the bits that its largest value needs.

    A record is what one all-to-all sends of each behaviour, or of each target, whatever the number of its fields.

    Args:
        largest: by name, the largest value of each field; the least is 0.
    """

    def __init__(self, largest: Mapping[str, int]) -> None:
        self._places: dict[str, list[tuple[int, int, int]]] = {}
        """By field: its pieces, the lower one first: word, shift within it, bits."""
        used: list[int] = []
        for name, value in largest.items():
            bits = max(1, value.bit_length())
            pieces = [bits] if bits < WORD_BITS else [LONG_BITS, bits - LONG_BITS]
            assert pieces[-1] < WORD_BITS, f"{name}: {value} needs more than two words"
            self._places[name] = []
            for piece in pieces:
                word = next((number for number, bits in enumerate(used) if bits + piece <= WORD_BITS), len(used))
                if word == len(used):
                    used.append(0)
                self._places[name].append((word, used[word], piece))
                used[word] += piece
        self.words = len(used)
        """w."""

    def pack(self, fields: Mapping[str, Tensor]) -> Tensor:
        """Pack columns of integers (X,), in 0 .. largest, into records, int32 (X, w)."""
        words: list[Tensor | None] = [None] * self.words
        for name, values_X in fields.items():
            rest_X = values_X
            for word, shift, bits in self._places[name]:
                piece_X = rest_X
                if len(self._places[name]) > 1:
                    piece_X, rest_X = rest_X & ((1 << bits) - 1), rest_X >> bits
                # Bits that are shifted out of 32 are none of the value's; the sign bit is a bit like the others.
                piece_X = piece_X.to(torch.int32) << shift if shift else piece_X.to(torch.int32)
                so_far = words[word]
                words[word] = piece_X if so_far is None else so_far | piece_X
        return torch.stack([word for word in words if word is not None], dim=1)

    def unpack(self, record_Xw: Tensor) -> dict[str, Tensor]:
        """Unpack records into columns, int32 (X,); int64 where a value may not fit into 32 bits."""
        fields = {}
        for name, places in self._places.items():
            pieces = [(record_Xw[:, word] >> shift) & ((1 << bits) - 1) for word, shift, bits in places]
            fields[name] = pieces[0] if len(pieces) == 1 else pieces[0].long() | (pieces[1].long() << LONG_BITS)
        return fields


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
        index_M, count_S = behaviors.index_B, behaviors.count_S.long()
        # An item decides the shard of its behaviour, so a window falls apart into one range on each shard. A shard's
        # behaviours keep their order, so (shard, index) ascends, and a search in it finds where each window begins and
        # ends on each shard. 32 bits are enough for small batches, and sort in half the time.
        dtype = torch.int32 if len(count_S) * len(index_M) <= torch.iinfo(torch.int32).max else torch.int64
        shard_S = torch.arange(len(count_S), device=index_M.device, dtype=dtype) * len(index_M)
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
        start_F = self.start_ST.flatten().repeat_interleave(count_ST.flatten(), output_size=len(local_index_F))
        return self.behaviors.index_B.index_select(0, start_F + local_index_F.long()).long()

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that ``stream`` uses the tensors."""
        for tensor in (*self.behaviors, self.first_S, self.start_ST, self.end_ST):
            tensor.record_stream(stream)


@dataclass(frozen=True)
class SearchSizes:
    """How much travels in a search; known to this rank when all ranks have said how much they send."""

    targets: Sequence[int]
    """Targets of each rank."""
    held: Sequence[int]
    """How many item rows of all ranks' targets each shard has."""
    sent: Mapping[str, Sequence[int]]
    """By sequence, the behaviours that this rank sends to each shard."""
    behaviors: Mapping[str, Sequence[int]]
    """By sequence, the behaviours that each rank sends to this shard."""
    answers: Mapping[str, tuple[Sequence[int], Sequence[int]]]
    """By sequence, how many behaviours each shard selects for this rank, and this shard for each rank."""
    span: int
    """Seconds from the earliest behaviour of a batch to its latest behaviour or target, the longest of all ranks."""
    targets_S: Tensor
    """int64: ``targets``, on the device."""
    behaviors_S: Mapping[str, Tensor]
    """int64: ``behaviors``, on the device."""


@dataclass(frozen=True)
class ShardTargets:
    """On a shard: the targets of all ranks, one rank's after the other's; all shards have the same."""

    columns: Mapping[Feature, Tensor]
    """Integers (G,): ids of items, of their features, and of whatever else targets have a value of their own of; for
    interval the time of the target."""

    def row(self, feature: Feature) -> Tensor | None:
        """The targets' own rows of a cross feature, or None; `embeddings.features.target_row` on a shard."""
        return self.columns.get(feature) if feature != "interval" else None


class ShardHistory(NamedTuple):
    """On a shard: those behaviours of a sequence whose item rows are there, and the targets' windows in them."""

    item_M: Tensor
    """int32: the local row of each behaviour's item."""
    start_G: Tensor
    """int64, counted in the shard's M."""
    end_G: Tensor
    """int64, counted in the shard's M."""
    pairs: Mapping[Feature, PairRows]
    """How pairs find their rows of the other features' tables."""


@dataclass(frozen=True)
class ShardInput:
    """All that a shard receives for one search."""

    targets: ShardTargets
    histories: Mapping[str, ShardHistory]
    """By sequence."""

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that ``stream`` uses the tensors."""
        tensors = [*self.targets.columns.values()]
        for history in self.histories.values():
            tensors += [history.item_M, history.start_G, history.end_G]
            tensors += [part for rows in history.pairs.values() for part in rows if isinstance(part, Tensor)]
        for tensor in tensors:
            tensor.record_stream(stream)


class SearchMessages:
    """Packs what a shard needs into records, and unpacks it there.

    Args:
        inherent: inherent features that the score is made of; item is the first.
        cross: cross features that it is made of.
        shard_rows: item rows of a shard.
        sizes: of the data, with the batch's bags: they decide how many bits a value has.
    """

    def __init__(
        self, inherent: Sequence[Feature], cross: Sequence[Feature], shard_rows: int, sizes: DataSizes
    ) -> None:
        self.features: tuple[Feature, ...] = (*inherent, *cross)
        """Those that the score is made of."""
        self._shard_rows, self._sizes = shard_rows, sizes
        # Of the other cross features a target has row 0.
        carried = {"interval", *(name for name, size in sizes.features.items() if size.target)}
        self._target_features: list[Feature] = [*inherent, *(feature for feature in cross if feature in carried)]
        self._positions = {
            # A power of 2 above N: any two indices of a window differ by less than that.
            sequence: (1 << length.bit_length()) - 1
            for sequence, length in sizes.lengths.items()
        }
        """By sequence: what an index is modulo, less 1."""

    def alone(self, batch: Batch) -> ShardInput:
        """The input of a shard that has all rows: the batch as it is, of which nothing needs to travel."""
        columns = {feature: batch.column(feature) for feature in self._target_features if feature != "interval"}
        histories = {}
        for sequence in self._sizes.lengths:
            history = batch.histories[sequence]
            others: list[Feature] = [feature for feature in self.features if feature != "item"]
            pairs = {feature: pair_rows(feature, batch, history) for feature in others}
            histories[sequence] = ShardHistory(history.item_M, history.start_T, history.end_T, pairs)
        return ShardInput(ShardTargets(columns), histories)

    def times(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The earliest behaviour's time, and the seconds to the latest behaviour or target; 0 if no feature needs them.

        int64 scalars, on the device.
        """
        zero = batch.timestamp_T.new_zeros(())
        times = [batch.histories[sequence].timestamp_M for sequence in self._sizes.lengths]
        if "interval" not in self.features or not any(len(times_M) for times_M in times):
            return zero, zero
        # Seconds since 1970 need more than 32 bits, those since the batch's earliest behaviour fewer, for up to 68
        # years.
        earliest, latest = torch.cat([*times, batch.timestamp_T]).aminmax()
        return earliest, latest - earliest

    def target_record(self, sequence: str, span: int) -> Record:
        """What a shard is told of each target: its window on the shard, and, once, the values of its own."""
        # Windows of one sequence after the other; the targets' own values travel with the first.
        fields = {"start": torch.iinfo(torch.int32).max, "length": self._sizes.lengths[sequence]}
        if "position" in self.features:
            fields["end"] = self._positions[sequence]
        if sequence == next(iter(self._sizes.lengths)):
            fields |= {f: span if f == "interval" else self._sizes.values(f) - 1 for f in self._target_features}
        return Record(fields)

    def behavior_record(self, sequence: str, span: int) -> Record:
        """What a shard is told of each behaviour."""
        largest = {"item": self._shard_rows - 1, "position": self._positions[sequence], "interval": span}
        return Record({f: largest[f] if f in largest else self._sizes.values(f) - 1 for f in self.features})

    def pack_targets(self, sequence: str, batch: Batch, windows: LocalWindows, earliest: Tensor, span: int) -> Tensor:
        """Pack targets and windows, int32 (S * T, w): those for shard 0, those for shard 1, ..."""
        history, shards = batch.histories[sequence], len(windows.first_S)
        # A shard sees this rank's behaviours from the first of those that it gets. A window travels as start and
        # length.
        fields: dict[str, Tensor] = {
            "start": (windows.start_ST - windows.first_S[:, None]).flatten(),
            "length": windows.length_ST.flatten(),
        }
        own: dict[str, Tensor] = {}
        if "position" in self.features:
            # Position is counted back from the end of the target's window in the whole history, not from its end on
            # this shard.
            own["end"] = history.end_T & self._positions[sequence]
        if sequence == next(iter(self._sizes.lengths)):
            # A target that is earlier than all behaviours of the batch has none before it, so its time does not matter.
            time_T = (batch.timestamp_T - earliest).clamp(min=0)
            for feature in self._target_features:
                own[feature] = time_T if feature == "interval" else batch.column(feature)
        fields |= {name: values_T.repeat(shards) for name, values_T in own.items()}
        return self.target_record(sequence, span).pack(fields)

    def pack_behaviors(self, sequence: str, batch: Batch, windows: LocalWindows, earliest: Tensor, span: int) -> Tensor:
        """Pack a sequence's behaviours, each for the shard of its item, int32 (M, w)."""
        history, index_M = batch.histories[sequence], windows.behaviors.index_B
        fields: dict[str, Tensor] = {}
        for feature in self.features:
            if feature == "item":
                fields[feature] = windows.behaviors.row_B
            elif feature == "position":
                fields[feature] = index_M & self._positions[sequence]
            else:
                column_M = pair_rows(feature, batch, history).column_M
                assert column_M is not None
                chosen_M = column_M.index_select(0, index_M)
                fields[feature] = chosen_M - earliest if feature == "interval" else chosen_M
        return self.behavior_record(sequence, span).pack(fields)

    def unpack(self, targets: Mapping[str, Tensor], behaviors: Mapping[str, Tensor], sizes: SearchSizes) -> ShardInput:
        """Make the shard's input of the records that have come: of targets and of behaviours, by sequence."""
        own: dict[str, Tensor] = {}
        histories = {}
        for sequence, count_S in sizes.behaviors_S.items():
            of_targets = self.target_record(sequence, sizes.span).unpack(targets[sequence])
            columns = self.behavior_record(sequence, sizes.span).unpack(behaviors[sequence])
            own = own or of_targets
            # Windows came counted within their rank's behaviours, which here lie one rank's after the other's.
            start_G = of_targets["start"].long()
            first_S = count_S.cumsum(0) - count_S
            start_G = start_G + first_S.repeat_interleave(sizes.targets_S, output_size=len(start_G))
            pairs: dict[Feature, PairRows] = {}
            for feature in self.features:
                if feature == "position":
                    mask = self._positions[sequence]
                    # Both are modulo a power of 2 above N, and so is their difference.
                    pairs[feature] = PairRows(PartKind.POSITION, columns[feature], of_targets["end"].long(), mask)
                elif feature == "interval":
                    pairs[feature] = PairRows(PartKind.INTERVAL, columns[feature].long(), own["interval"].long())
                elif feature != "item":
                    pairs[feature] = PairRows(PartKind.VALUE, columns[feature])
            histories[sequence] = ShardHistory(columns["item"], start_G, start_G + of_targets["length"], pairs)
        return ShardInput(ShardTargets({feature: own[feature] for feature in self._target_features}), histories)
