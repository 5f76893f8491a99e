"""From a planned epoch to batches: row groups fill the shuffle buffer, and batches are cut from it.

T = targets.
"""

from collections.abc import Callable, Generator, Iterator, Mapping

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.stream.data_set import DataSet
from pipeline.stream.epoch_plan import Block, Piece
from pipeline.stream.reader import RowGroupReader
from pipeline.stream.row_group import RowGroup
from pipeline.stream.samples import HistorySamples, SequenceCut, samples_of
from pipeline.stream.user_sample import UserSample
from schemas.errors import UserError
from schemas.shards import Split

I64 = NDArray[np.int64]


def read_blocks(
    data_set: DataSet,
    split: Split,
    sample: UserSample,
    cuts: Mapping[str, SequenceCut],
    blocks: tuple[Block, ...],
    threads: int,
) -> Generator[tuple[Block, HistorySamples], None, None]:
    """Read blocks in order; while one is in use, the reader's threads work on the next.

    Raises:
        UserError: a row group that cannot be read or that does not hold what the manifest and the index say.
    """
    # Flat lists, one entry a row group: the reader knows row groups by their number here, and nothing of blocks.
    pieces = [piece for block in blocks for piece in block.pieces]
    addresses = [data_set.address(piece.group) for piece in pieces]
    largest_ids = data_set.largest_ids()

    def convert(table: pa.Table, index: int) -> HistorySamples:
        try:
            group = RowGroup.from_table(table, largest_ids)
            return _samples_of_piece(data_set, split, sample, cuts, pieces[index], group)
        except UserError as error:
            raise UserError(f"{addresses[index]}: {error}; prepare the data set again") from None

    # A whole block may wait: otherwise reading would stop while the consumer works through the block before.
    ahead = max(threads, max((len(block.pieces) for block in blocks), default=0))
    with RowGroupReader(addresses, data_set.schema, convert, threads=threads, ahead=ahead) as reader:
        for block in blocks:
            # The reader keeps the order of ``pieces``, whatever its threads do, so the next ones are those of this
            # block. Each row group is in one block of a rank alone: parts have no user in common.
            yield block, HistorySamples.concatenate([next(reader) for _ in block.pieces])


def _samples_of_piece(
    data_set: DataSet,
    split: Split,
    sample: UserSample,
    cuts: Mapping[str, SequenceCut],
    piece: Piece,
    group: RowGroup,
) -> HistorySamples:
    """The piece's targets of the sample's users, with the parts of their users' histories that they see."""
    chosen_T = np.flatnonzero(group.target_T["split"] == split)
    users, targets = int(data_set.users_G[piece.group]), int(data_set.targets_G[split.name.lower()][piece.group])
    # The epoch was planned by the index: were it wrong, targets would be left out in silence.
    if len(group.user_id_U) != users or len(chosen_T) != targets:
        raise UserError(
            f"{len(group.user_id_U)} users and {len(chosen_T)} targets, "
            f"the index of row groups says {users} and {targets}"
        )
    if sample.fraction < 1:
        chosen_T = chosen_T[sample.keeps(group.user_id_U)[group.user_T[chosen_T]]]
    return samples_of(group, cuts).take(chosen_T[piece.first : piece.last])


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
        order_T = order(block, samples)
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
