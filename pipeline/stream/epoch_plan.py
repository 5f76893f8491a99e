"""What a rank reads in an epoch and in which order: a pure function of the index of row groups and a few numbers.

The row groups of a split are shuffled by (seed, epoch). Their targets, in that order, form one sequence, which is cut
into ``world`` contiguous ranges that differ by one target at most: every target is in exactly one, and a row group on a
border is read by both sides. A rank's range is cut into blocks, each the size of the shuffle buffer, and within a block
the targets are shuffled by (seed, epoch, block).

Where the number of ranks or the size of their batches changes within an epoch, what each rank had left, one after the
other, is the sequence that is cut into new ranges. Blocks that nobody had begun are cut as the sequence was. The one
that a rank was at keeps its targets and their order, of which the new ranks take the parts that are left: each of them
reads the block whole, as the rank did. Blocks of a new rank that fit into the shuffle buffer together are mixed: where
all of a former rank's share was in its buffer, its users would otherwise be trained on alone.

G = row groups, in file order; O = those that hold targets, in the epoch's order; T = targets of a block and U = their
users.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.hashing import mix

I64 = NDArray[np.int64]

ORDER = 2
"""Grows when the order of an epoch changes: to resume at a step within an epoch means nothing in another order."""


class Change(NamedTuple):
    """How an epoch was read until the number of ranks or the size of their batches changed within it."""

    world: int
    batch_size: int
    """Targets in a batch of one rank."""
    steps: int
    """Steps that each rank made: at least one, and fewer than were left of the epoch."""


class Piece(NamedTuple):
    """Targets first .. last of a row group, counted among its targets of the split and of the sample's users."""

    group: int
    first: int
    last: int


class Block(NamedTuple):
    """Pieces that are shuffled together."""

    start: int
    """Targets of the rank before this block."""
    targets: int
    """Targets of the rank in this block: all of it, unless it was begun before the last change."""
    key: int
    """Targets of the epoch's sequence before this block, which tells all blocks apart."""
    pieces: tuple[Piece, ...]
    first: int = 0
    """Targets of the block, in its shuffled order, before the rank's own: those that others have, or had."""
    parts: "tuple[Block, ...]" = ()
    """Blocks of former ranks that are mixed in this one; their targets are numbered over all parts, in ``start``."""


@dataclass(frozen=True)
class EpochPlan:
    """A rank's share of an epoch."""

    blocks: tuple[Block, ...]
    targets: int
    """Targets of the rank."""


def targets_left(targets: int, changes: Sequence[Change]) -> int:
    """The number of an epoch's ``targets`` that nobody had before the last of ``changes``."""
    # Up to a change all batches were full: the ranks' shares differ by one target at most, and a step was left.
    return targets - sum(change.world * change.batch_size * change.steps for change in changes)


def steps_per_epoch(targets: int, world: int, batch_size: int, changes: Sequence[Change] = ()) -> int:
    """The number of steps that every rank makes: as many as the largest share needs, and those before ``changes``."""
    share = -(-targets_left(targets, changes) // world)
    return sum(change.steps for change in changes) - (-share // batch_size)


def plan_epoch(
    targets_G: I64,
    bytes_G: I64,
    block_bytes: int,
    *,
    shuffle: bool,
    seed: int,
    epoch: int,
    rank: int,
    world: int,
    changes: Sequence[Change] = (),
) -> EpochPlan:
    """Plan an epoch of a rank.

    Args:
        targets_G: targets of the split.
        bytes_G: room that each row group takes in the shuffle buffer.
        block_bytes: size of the shuffle buffer; a block holds one row group at least.
        shuffle: shuffle the row groups; otherwise they come in file order, a block each.
        seed: decides the shuffle.
        epoch: from 0; each has a shuffle of its own.
        rank: which of the ``world`` readers this is.
        world: number of readers.
        changes: how the epoch was read before, in order; the plan is of what is left of it.
    """
    order_O = np.flatnonzero(targets_G)
    if shuffle:
        # Sorted by keys, and stably: unlike a generator's permutation, it depends on neither numpy's version nor the
        # machine.
        order_O = order_O[np.argsort(shuffle_keys(len(order_O), seed, epoch, 0), kind="stable")]
    end_O = np.cumsum(targets_G[order_O])
    total = int(end_O[-1]) if len(end_O) else 0
    worlds = [*(change.world for change in changes), world]
    lefts = [targets_left(total, changes[:done]) for done in range(len(worlds))]

    @cache
    def share(done: int, rank: int) -> list[Block]:
        """Blocks of a rank after the first ``done`` changes."""
        begin, end = _range(lefts[done], rank, worlds[done])
        if not done:
            return _cut_into_blocks(order_O, end_O, targets_G, bytes_G, block_bytes if shuffle else -1, begin, end)
        former, blocks, position = changes[done - 1], list[Block](), 0
        had = former.batch_size * former.steps
        # Of the former ranks only those are planned whose rest this one has a part of.
        for former_rank in range(former.world):
            former_begin, former_end = _range(lefts[done - 1], former_rank, former.world)
            first, position = position, position + former_end - former_begin - had
            if max(begin, first) < min(end, position):
                part = had + max(begin - first, 0), had + min(end, position) - first
                blocks += _rest(share(done - 1, former_rank), had, *part)
        return _numbered(_mixed(blocks, bytes_G, block_bytes) if shuffle else blocks)

    blocks = share(len(changes), rank)
    return EpochPlan(tuple(blocks), sum(block.targets for block in blocks))


def _range(targets: int, rank: int, world: int) -> tuple[int, int]:
    # Python's integers: the product does not overflow, and shares differ by one target at most.
    return targets * rank // world, targets * (rank + 1) // world


def _cut_into_blocks(
    order_O: I64, end_O: I64, targets_G: I64, bytes_G: I64, block_bytes: int, begin: int, end: int
) -> list[Block]:
    """Cut targets ``begin`` .. ``end`` of an epoch's sequence into blocks of ``block_bytes``; -1: a row group each."""
    blocks: list[Block] = []
    pieces: list[Piece] = []
    start = position = begin
    room = block_bytes
    # From the row group that holds the rank's first target; it may have begun before, in the share of the rank before.
    for index in range(int(np.searchsorted(end_O, begin, side="right")), len(order_O)):
        if position >= end:
            break
        group = int(order_O[index])
        size = int(bytes_G[group])
        # The next row group does not fit: close the block. One that is larger than the whole buffer gets a block alone.
        if pieces and size > room:
            blocks.append(Block(start - begin, position - start, start, tuple(pieces)))
            pieces, start, room = [], position, block_bytes
        # Targets of the epoch before this row group, and the last of its targets that belongs to this rank.
        before = int(end_O[index]) - int(targets_G[group])
        last = min(int(end_O[index]), end)
        pieces.append(Piece(group, position - before, last - before))
        position = last
        room -= size
    if pieces:
        blocks.append(Block(start - begin, position - start, start, tuple(pieces)))
    return blocks


def _rest(blocks: Sequence[Block], had: int, begin: int, end: int) -> list[Block]:
    """Targets ``begin`` .. ``end`` of a rank's ``blocks``, of which the rank had the first ``had``."""
    rest = []
    for block in blocks:
        first, last = max(begin - block.start, 0), min(end - block.start, block.targets)
        if first >= last:
            continue
        if block.first or block.start < had:
            # Begun: which targets are left, the shuffled order of the whole block alone can tell.
            rest.append(block._replace(targets=last - first, first=block.first + first))
        elif block.parts:
            rest += _rest(block.parts, 0, first, last)
        else:
            rest.append(Block(0, last - first, block.key + first, _pieces(block.pieces, first, last)))
    return rest


def _mixed(blocks: list[Block], bytes_G: I64, block_bytes: int) -> list[Block]:
    """Put blocks that follow each other into one, as many as fit into the shuffle buffer."""
    mixed: list[Block] = []
    parts: list[Block] = []
    room = block_bytes

    def close() -> None:
        if len(parts) < 2:
            mixed.extend(parts)
            return
        pieces = tuple(piece for part in parts for piece in part.pieces)
        mixed.append(Block(0, sum(part.targets for part in parts), parts[0].key, pieces, 0, tuple(_numbered(parts))))

    for block in blocks:
        size = sum(int(bytes_G[piece.group]) for piece in block.pieces)
        if parts and size > room:
            close()
            parts, room = [], block_bytes
        parts.append(block)
        room -= size
    close()
    return mixed


def _pieces(pieces: tuple[Piece, ...], first: int, last: int) -> tuple[Piece, ...]:
    """Targets ``first`` .. ``last`` of pieces, counted over all of them."""
    cut, before = [], 0
    for piece in pieces:
        begin, end = max(piece.first, piece.first + first - before), min(piece.last, piece.first + last - before)
        if begin < end:
            cut.append(Piece(piece.group, begin, end))
        before += piece.last - piece.first
    return tuple(cut)


def _numbered(blocks: list[Block]) -> list[Block]:
    """Blocks that follow each other as those of a rank."""
    numbered, start = [], 0
    for block in blocks:
        numbered.append(block._replace(start=start))
        start += block.targets
    return numbered


def order_of(block: Block, user_T: I64, together: int | None, seed: int, epoch: int) -> I64:
    """The shuffled order of all targets of a block's pieces, those that are the rank's own and others.

    Args:
        block: with ``parts``, the targets of each that are left, in their order, are spread evenly over all of them.
        user_T: (T,), users of the targets, ascending; those of two parts have nothing in common.
        together: as for `shuffled_order`.
        seed: likewise.
        epoch: likewise.

    Returns:
        The targets in their order: (T,), or with ``parts`` those alone that are left of them.
    """
    if not block.parts:
        return shuffled_order(user_T - user_T[:1], together, seed, epoch, block.key)
    orders, positions, before = list[I64](), list[NDArray[np.float64]](), 0
    for number, part in enumerate(block.parts):
        whole = sum(piece.last - piece.first for piece in part.pieces)
        order_T = order_of(part, user_T[before : before + whole], together, seed, epoch)
        orders.append(before + order_T[part.first : part.first + part.targets])
        positions.append((np.arange(part.targets) + (number + 0.5) / len(block.parts)) / part.targets)
        before += whole
    return np.concatenate(orders)[np.argsort(np.concatenate(positions), kind="stable")]


def shuffle_keys(count: int, *salts: int) -> NDArray[np.uint64]:
    """Pseudo-random keys, (count,), to sort by for a shuffle. They depend on ``salts`` alone, on every machine."""
    # One salt after the other, so that their order matters: epoch 1 of seed 2 is not epoch 2 of seed 1.
    keys = np.arange(count, dtype=np.uint64)
    for salt in salts:
        keys = mix(keys, salt)
    return keys


def shuffled_order(user_T: I64, together: int | None, seed: int, epoch: int, block: int) -> I64:
    """Shuffle users and, where they are to be spread, their targets.

    With ``together`` = k, a user's targets are shuffled and dealt out in chunks of k at most, evenly over the whole
    buffer from a random beginning: of n chunks one in each n-th part of it. So each batch has users of all kinds, to
    the last one; dealt out in turns, the last batches would be of the few users with the most targets. A batch holds at
    most k targets of a user who has clearly fewer chunks than the buffer has batches.

    Args:
        user_T: (T,), users of the targets, ascending from 0.
        together: k; None: all targets of a user stay together.
        seed: decides the order, together with ``epoch`` and ``block`` and with nothing else.
        epoch: from 0.
        block: key of the block.

    Returns:
        (T,), the targets in their new order.
    """
    users = int(user_T[-1]) + 1 if len(user_T) else 0
    rank_U = np.empty(users, np.int64)  # of each user in the shuffled order of users
    rank_U[np.argsort(shuffle_keys(users, seed, epoch, block, 1), kind="stable")] = np.arange(users)
    if together is None:
        return np.argsort(rank_U[user_T], kind="stable")
    shuffled_T = np.lexsort((shuffle_keys(len(user_T), seed, epoch, block, 2), user_T))
    # Shuffling within users leaves the users where they are: user_T holds for shuffled_T too.
    # Split each user's n targets into as few chunks as k allows, of sizes that differ by one at most.
    first_U = np.searchsorted(user_T, np.arange(users))
    targets_U = np.bincount(user_T, minlength=users)
    chunks_U = -(-targets_U // together)
    chunk_T = (np.arange(len(user_T)) - first_U[user_T]) * chunks_U[user_T] // targets_U[user_T]
    # Where in the buffer (0 .. 1) a chunk goes; a user's rank is its random beginning within the first n-th.
    position_T = (chunk_T + rank_U[user_T] / users) / chunks_U[user_T]
    return shuffled_T[np.lexsort((rank_U[user_T], position_T))]
