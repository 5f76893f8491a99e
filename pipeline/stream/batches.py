"""From a planned epoch to batches: which users take part, row groups that fill the shuffle buffer, batches cut from it.

T = targets, U = users of a row group, M = their targets of all splits, G = row groups.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.hashing import mix
from pipeline.stream.data_set import DataSet
from pipeline.stream.epoch_plan import Block, Piece
from pipeline.stream.reader import RowGroupReader
from pipeline.stream.row_group import NoNegativeError, RowGroup, flat_column, list_column, user_keys
from pipeline.stream.samples import HistorySamples, Items, SequenceCut, samples_of
from schemas.errors import UserError
from schemas.shards import Split

if TYPE_CHECKING:
    # Most runs need neither.
    from pipeline.stream.negatives import Negatives
    from pipeline.stream.translation import Translation

I64 = NDArray[np.int64]

_SALT = 0x5A3D
"""Fixed, so that runs with different seeds are validated on the same users. Nothing else is drawn with it."""


class UserSample(NamedTuple):
    """About ``fraction`` of all users: those whose hashed raw id is below it. 1 keeps everyone."""

    fraction: float = 1.0

    def keeps(self, user_key_U: NDArray[Any]) -> NDArray[np.bool_]:
        """Whether each user, by its key (`pipeline.stream.row_group.user_keys`), is in the sample, (U,)."""
        # The upper 53 bits as a number in [0, 1), which float64 holds exactly.
        return (mix(user_key_U, _SALT) >> np.uint64(11)) * 2.0**-53 < self.fraction


def sampled_targets(data_set: DataSet, split: Split, sample: UserSample, threads: int) -> I64:
    """Targets of the sample's users in each row group, (G,); reads two columns of the row groups that have any.

    Raises:
        UserError: a row group that cannot be read, or no user at all is in the sample.
    """
    # The index counts the targets of all users. All ranks must know how many are left before the first step, because
    # they make the same number of steps.
    targets_G = data_set.targets_G[split.name.lower()].copy()
    groups = np.flatnonzero(targets_G)
    schema = pa.schema([data_set.schema().field(name) for name in ("user_id", "target_split")])

    def count(table: pa.Table, index: int) -> int:
        offset_U, split_M = list_column("target_split", table["target_split"])
        kept_M = np.repeat(sample.keeps(user_keys(flat_column("user_id", table["user_id"]))), np.diff(offset_U))
        return int(np.count_nonzero(kept_M & (split_M == split)))

    addresses = [data_set.address(int(group)) for group in groups]
    with RowGroupReader(addresses, schema, count, threads=threads, ahead=2 * threads) as reader:
        targets_G[groups] = [next(reader) for _ in groups]
    if not targets_G.any():
        raise UserError(
            f"{data_set.folder}: a fraction of {sample.fraction:g} leaves no user with targets in split "
            f"{split.name.lower()}; choose a larger one"
        )
    return targets_G


@dataclass(frozen=True)
class Reading:
    """What a stream reads of row groups, and what it makes of them."""

    data_set: DataSet
    split: Split
    schema: pa.Schema
    """Columns that are read."""
    cuts: Mapping[str, SequenceCut]
    items: Items
    sample: UserSample
    translation: "Translation | None"
    negatives: "Negatives | None"
    whole_histories: bool = False
    """Targets have columns about their users' whole histories."""

    def samples(self, table: pa.Table, first_user: int, piece: Piece, epoch: int) -> HistorySamples:
        """The piece's targets of the sample's users, with the parts of their users' histories that they see.

        Args:
            table: the row group.
            first_user: number of its first user in the data set.
            piece: which of its targets.
            epoch: decides the negatives that are drawn, where they are.

        Raises:
            UserError: it does not hold what the manifest and the index say.
        """
        group = self._group(table, first_user)
        chosen_T = np.flatnonzero(group.target_T["split"] == self.split)
        users = int(self.data_set.users_G[piece.group])
        targets = int(self.data_set.targets_G[self.split.name.lower()][piece.group])
        # The epoch was planned by the index: were it wrong, targets would be left out in silence.
        if len(group.user_id_U) != users or len(chosen_T) != targets:
            raise UserError(
                f"{len(group.user_id_U)} users and {len(chosen_T)} targets, "
                f"the index of row groups says {users} and {targets}"
            )
        if self.sample.fraction < 1:
            chosen_T = chosen_T[self.sample.keeps(group.user_key_U)[group.user_T[chosen_T]]]
        if self.negatives is None:
            samples = self._samples_of(group).take(chosen_T[piece.first : piece.last])
        else:
            index, drawn = self.negatives.columns(group, chosen_T, piece, epoch)
            samples = self._samples_of(group).take(index)
            samples = replace(samples, columns_T=samples.columns_T | drawn)
        # Of what the piece's windows reach alone.
        return samples.with_items(self.items)

    def no_samples(self) -> HistorySamples:
        """Samples without targets or users, with all columns that others have."""
        # Made on the same way as real samples, so that names and dtypes are the same: ranks exchange these columns.
        group = self._group(self.schema.empty_table(), 0)
        return self._samples_of(group).take(np.zeros(0, np.int64)).with_items(self.items)

    def _samples_of(self, group: RowGroup) -> HistorySamples:
        return samples_of(group, self.cuts, whole_histories=self.whole_histories)

    def _group(self, table: pa.Table, first_user: int) -> RowGroup:
        group = RowGroup.from_table(table, self.data_set.largest_ids(), first_user)
        return group if self.translation is None else self.translation.of(group)


def read_blocks(
    reading: Reading, blocks: tuple[Block, ...], threads: int, epoch: int
) -> Generator[tuple[Block, HistorySamples], None, None]:
    """Read blocks in order; while one is in use, the reader's threads work on the next.

    Raises:
        UserError: a row group that cannot be read or that does not hold what the manifest and the index say.
    """
    # Flat lists, one entry a row group: the reader knows row groups by their number here, and nothing of blocks.
    pieces = [piece for block in blocks for piece in block.pieces]
    addresses = [reading.data_set.address(piece.group) for piece in pieces]
    first_user_G = reading.data_set.first_user_G

    def convert(table: pa.Table, index: int) -> HistorySamples:
        try:
            return reading.samples(table, int(first_user_G[pieces[index].group]), pieces[index], epoch)
        except NoNegativeError:
            raise
        except UserError as error:
            raise UserError(f"{addresses[index]}: {error}; prepare the data set again") from None

    # A whole block may wait: otherwise reading would stop while the consumer works through the block before.
    ahead = max(threads, max((len(block.pieces) for block in blocks), default=0))
    with RowGroupReader(addresses, reading.schema, convert, threads=threads, ahead=ahead) as reader:
        for block in blocks:
            # The reader keeps the order of ``pieces``, whatever its threads do, so the next ones are those of this
            # block. A row group is in a block once: samples have no user in common. (In one that mixes parts, a row
            # group on the border of two former ranks may be twice; then so are its users, each with other targets.)
            yield block, HistorySamples.concatenate([next(reader) for _ in block.pieces])


def cut_batches(
    blocks: Iterator[tuple[Block, HistorySamples]],
    order: Callable[[Block, HistorySamples], I64],
    batch_size: int,
    first_target: int,
) -> Generator[HistorySamples, None, None]:
    """Cut batches of exactly ``batch_size`` targets, but for the last one; what a block leaves over goes into the next.

    Args:
        blocks: from the block that holds ``first_target`` on.
        order: gives the order of a block's targets.
        batch_size: number of targets.
        first_target: where to begin, counted over all blocks of the rank.
    """
    parts: list[HistorySamples] = []
    missing = batch_size
    for block, samples in blocks:
        order_T = order(block, samples)[block.first : block.first + block.targets]
        # A resumed epoch begins within a block: the block is read and shuffled whole, or its order would be another
        # one.
        position = max(0, first_target - block.start)
        while position < len(order_T):
            index_T = order_T[position : position + missing]
            parts.append(samples.take(index_T))
            position += len(index_T)
            # A batch may take the rest of one block and the beginning of the next.
            missing -= len(index_T)
            if not missing:
                yield HistorySamples.concatenate(parts)
                parts, missing = [], batch_size
        del samples  # Before the next block is put together, or two of them would be in memory.
    if parts:
        yield HistorySamples.concatenate(parts)
