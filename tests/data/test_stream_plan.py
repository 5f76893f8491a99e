"""An epoch's plan and the order in a shuffle buffer."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.stream.epoch_plan import (
    ORDER,
    Block,
    Change,
    EpochPlan,
    order_of,
    plan_epoch,
    shuffled_order,
    steps_per_epoch,
    targets_left,
)

quick = settings(deadline=None)  # a machine under load takes as long as it takes
counts = st.lists(st.integers(0, 12), max_size=20)


def plans(
    targets: list[int],
    world: int,
    *,
    block: int = 7,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    changes: Sequence[Change] = (),
) -> list[EpochPlan]:
    targets_G, how = np.array(targets, np.int64), {"shuffle": shuffle, "seed": seed, "epoch": epoch, "changes": changes}
    return [plan_epoch(targets_G, targets_G, block, **how, rank=rank, world=world) for rank in range(world)]


def in_order(plan: EpochPlan, shuffle: bool) -> list[tuple[int, int]]:
    """(row group, target) of a rank, as it comes to them; each three targets of a row group are of a user."""
    found = []
    for block in plan.blocks:
        pieces = [(piece.group, target) for piece in block.pieces for target in range(piece.first, piece.last)]
        users = [(group, target // 3) for group, target in pieces]
        user_T = np.cumsum([place > 0 and user != users[place - 1] for place, user in enumerate(users)])
        order = order_of(block, user_T, 2, 0, 0) if shuffle else np.arange(len(pieces))
        found += [pieces[index] for index in order[block.first : block.first + block.targets]]
    return found


@quick
@given(counts, st.integers(1, 9), st.integers(0, 30), st.booleans())
def test_ranks_share_every_target_once(targets: list[int], world: int, block: int, shuffle: bool) -> None:
    shares = plans(targets, world, block=block, shuffle=shuffle)
    seen = [
        (piece.group, target)
        for plan in shares
        for b in plan.blocks
        for piece in b.pieces
        for target in range(piece.first, piece.last)
    ]
    assert sorted(seen) == [(group, target) for group, count in enumerate(targets) for target in range(count)]
    sizes = [plan.targets for plan in shares]
    assert max(sizes) - min(sizes) <= 1
    keys = [b.key for plan in shares for b in plan.blocks]
    assert len(set(keys)) == len(keys)
    for plan in shares:
        start = 0
        for b in plan.blocks:
            assert b.start == start
            assert b.targets == sum(piece.last - piece.first for piece in b.pieces) > 0
            assert len(b.pieces) == 1 or sum(targets[piece.group] for piece in b.pieces) <= block
            start += b.targets
        assert start == plan.targets
        for batch_size in (1, 4, 50):
            steps = steps_per_epoch(sum(targets), world, batch_size)
            assert steps - 1 <= -(-plan.targets // batch_size) <= steps


@quick
@given(counts.filter(any), st.integers(0, 40), st.booleans(), st.data())
def test_ranks_that_change_share_every_target_once(
    targets: list[int], block: int, shuffle: bool, data: st.DataObject
) -> None:
    """Whatever numbers of ranks follow each other in an epoch, after whatever steps, with whatever sizes of batches."""
    changes: list[Change] = []
    seen: list[tuple[int, int]] = []
    former: list[EpochPlan] = []
    while True:
        world, size = data.draw(st.integers(1, 6), "world"), data.draw(st.integers(1, 9), "batch size")
        left = sum(targets) - len(seen)
        assert targets_left(sum(targets), changes) == left > 0
        shares = plans(targets, world, block=block, shuffle=shuffle, changes=changes)
        orders = [in_order(plan, shuffle) for plan in shares]
        sizes = [len(order) for order in orders]
        assert sizes == [plan.targets for plan in shares]
        assert (sum(sizes), max(sizes) - min(sizes) > 1) == (left, False)
        check_blocks(shares, former, changes, targets, block)
        done = sum(change.steps for change in changes)
        steps = steps_per_epoch(sum(targets), world, size, changes) - done
        assert steps == -(-max(sizes) // size)
        # What is handed out again is not in another order than it would have had: of a block that was begun, the rest.
        if steps < 2 or (stop := data.draw(st.integers(0, steps - 1), "steps")) == 0:
            seen += [target for order in orders for target in order]
            break
        seen += [target for order in orders for target in order[: stop * size]]
        assert len(seen) == sum(targets) - left + world * stop * size, "up to a change all batches are full"
        former = shares
        changes.append(Change(world, size, stop))
    assert sorted(seen) == [(group, target) for group, count in enumerate(targets) for target in range(count)]


def check_blocks(
    shares: list[EpochPlan], former: list[EpochPlan], changes: list[Change], targets: list[int], room: int
) -> None:
    """The blocks of all ranks after some changes, against those before the last of them."""

    def begun_in(blocks: Sequence[Block], had: int) -> dict[int, Block]:
        begun = {b.key: b for b in blocks if b.first or b.start < had < b.start + b.targets}
        for b in blocks:
            if b.start >= had and not b.first:
                begun |= begun_in(b.parts, 0)
        return begun

    begun: dict[int, Block] = {}
    for plan in former:
        begun |= begun_in(plan.blocks, changes[-1].steps * changes[-1].batch_size)
    keys: Counter[int] = Counter()

    def check(blocks: Sequence[Block]) -> None:
        start = 0
        for b in blocks:
            assert b.start == start
            start += b.targets
            assert b.targets > 0
            assert len(b.pieces) == 1 or sum(targets[piece.group] for piece in b.pieces) <= room, (
                "the buffer is bounded"
            )
            if b.first:
                same = begun[b.key]
                assert (b.pieces, b.parts) == (same.pieces, same.parts), "or the shuffled order would be another one"
            elif b.parts:
                assert b.targets == sum(part.targets for part in b.parts)
                assert b.pieces == tuple(piece for part in b.parts for piece in part.pieces)
                check(b.parts)
            else:
                assert b.key not in begun
                assert b.targets == sum(piece.last - piece.first for piece in b.pieces), (
                    "no more than is needed is read"
                )
                keys[b.key] += 1

    for plan in shares:
        check(plan.blocks)
    assert set(keys.values()) <= {1}, "their keys tell them apart"


def test_what_fits_into_a_buffer_is_mixed() -> None:
    """Two ranks have read half of the row groups each; the one that goes on reads from both rests alike."""
    targets, changes = [1] * 60, [Change(2, 2, 5)]
    halves = [{group for group, _ in in_order(plan, True)[10:]} for plan in plans(targets, 2, block=60)]
    for other, steps in ((1, 3), (3, 2)):
        for plan in plans(targets, other, block=60, changes=changes):
            order = [group for group, _ in in_order(plan, True)]
            from_first = np.cumsum([group in halves[0] for group in order])
            assert other == 3 or np.abs(from_first - np.arange(1, len(order) + 1) / 2).max() <= 0.5
            assert len(plan.blocks) == 1
        changes.append(Change(other, 2, steps))
    # What does not fit stays apart.
    assert len(plans(targets, 1, block=59, changes=changes[:1])[0].blocks) == 2


@quick
@given(counts, st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(1, 9))
def test_going_on_on_other_ranks_is_the_former_order_cut_anew(
    targets: list[int], world: int, other: int, steps: int, size: int
) -> None:
    """Of each former rank what it had left, one after the other; what it had begun is in the order that it had."""
    if steps >= steps_per_epoch(sum(targets), world, size):
        return
    # In the smallest of buffers, where nothing is mixed.
    former, had = plans(targets, world, block=0), steps * size
    rest = [target for plan in former for target in in_order(plan, True)[had:]]
    now = [
        target
        for plan in plans(targets, other, block=0, changes=[Change(world, size, steps)])
        for target in in_order(plan, True)
    ]
    begun = 0
    for plan in former:
        left = next((b.start + b.targets - had for b in plan.blocks if b.start < had < b.start + b.targets), 0)
        assert now[begun : begun + left] == rest[begun : begun + left]
        begun += plan.targets - had
        assert {*now[begun - plan.targets + had : begun]} == {*rest[begun - plan.targets + had : begun]}


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        plan = plans([1] * 30, 1, seed=seed, epoch=epoch)[0]
        return [piece.group for b in plan.blocks for piece in b.pieces]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(10) for epoch in range(10)}) == 100
    first = [order(0, epoch)[0] for epoch in range(600)]
    assert np.bincount(first, minlength=30).min() > 3, "every row group comes first now and then"


def test_unshuffled_plan_is_the_order_of_the_files() -> None:
    plan = plans([3, 0, 2, 4], 1, shuffle=False)[0]
    assert [b.pieces for b in plan.blocks] == [((0, 0, 3),), ((2, 0, 2),), ((3, 0, 4),)]


@quick
@given(st.lists(st.integers(1, 9) | st.integers(20, 60), max_size=12), st.none() | st.integers(1, 5), st.integers(0, 3))
def test_shuffled_order_deals_out_users(counts: list[int], together: int | None, epoch: int) -> None:
    user_T = np.repeat(np.arange(len(counts)), counts)
    order_T = shuffled_order(user_T, together, seed=1, epoch=epoch, block=0)
    assert sorted(order_T.tolist()) == list(range(len(user_T)))
    positions_U = [np.flatnonzero(user_T[order_T] == user).tolist() for user in range(len(counts))]
    if together is None:
        for user in range(len(counts)):
            of_user = order_T[positions_U[user]].tolist()
            assert of_user == sorted(of_user), "the order of the files"
        assert all(positions == list(range(positions[0], positions[-1] + 1)) for positions in positions_U)
        return
    # At any moment, of every user the same share of chunks has been dealt out, to within a chunk.
    for done in range(len(user_T) + 1):
        shares = [
            (sum(position < done for position in positions) / count, 1 / -(-count // together) + together / count)
            for positions, count in zip(positions_U, counts, strict=True)
        ]
        assert all(abs(a - b) <= slack_a + slack_b + 1e-9 for a, slack_a in shares for b, slack_b in shares)


@quick
@given(st.lists(st.integers(1, 60), min_size=30, max_size=60), st.integers(1, 4), st.integers(0, 3))
def test_batches_hold_few_targets_of_a_user(counts: list[int], together: int, epoch: int) -> None:
    user_T = np.repeat(np.arange(len(counts)), counts)
    order_T = shuffled_order(user_T, together, seed=1, epoch=epoch, block=0)
    most = max(-(-count // together) for count in counts)
    batch = len(user_T) // (3 * most)  # three times as many batches as any user has chunks
    for start in range(0, len(user_T), max(1, batch)):
        assert np.bincount(user_T[order_T[start : start + batch]], minlength=1).max() <= together


def test_shuffled_order_spreads_labels() -> None:
    """Shards have a positive before its negatives; dealt out in that order, the first batches would be all positive."""
    user_T = np.repeat(np.arange(300), 3)
    order_T = shuffled_order(user_T, 1, seed=0, epoch=0, block=0)
    first_of_user = order_T % 3 == 0
    assert 0.2 < first_of_user[:300].mean() < 0.5
    assert not np.array_equal(order_T, shuffled_order(user_T, 1, seed=0, epoch=1, block=0))
    assert not np.array_equal(order_T, shuffled_order(user_T, 1, seed=0, epoch=0, block=1))


def test_the_order_is_the_one_that_its_number_names() -> None:
    """A checkpoint within an epoch counts targets of this very order: another order needs another `ORDER`."""
    user_T = np.repeat(np.arange(4), [5, 1, 3, 2])
    spread, together = (shuffled_order(user_T, k, seed=7, epoch=3, block=5).tolist() for k in (2, None))
    assert ORDER == 2
    assert spread == [9, 10, 0, 4, 5, 8, 7, 3, 2, 1, 6]
    assert together == [9, 10, 5, 0, 1, 2, 3, 4, 6, 7, 8]
