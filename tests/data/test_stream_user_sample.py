"""A sample of users: decided by their raw ids alone, and whole."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from embeddings.batch import Batch
from pipeline.stream.history_stream import HistoryStream
from schemas.errors import UserError
from schemas.shards import Split
from schemas.stream import StreamSettings
from tests.datasets import User, random_users, write_dataset

USERS = random_users(150, seed=3)
SETTINGS = StreamSettings(batch_size=16, history_length=10)


def written(folder: Path, users: list[User], **layout: int) -> Path:
    write_dataset(folder, users, **layout)
    return folder


def read(folder: Path, fraction: float, world: int = 1, seed: int = 5, shuffle: bool = False) -> list[list[Batch]]:
    """An epoch's batches of each rank."""
    found = []
    for rank in range(world):
        with HistoryStream(
            folder, "validation", SETTINGS, seed=seed, shuffle=shuffle, rank=rank, world=world, user_fraction=fraction
        ) as stream:
            found.append(list(stream))
            assert len(found[-1]) == stream.steps_per_epoch
    return found


def targets(ranks: Iterable[Iterable[Batch]]) -> list[tuple[int, int]]:
    """(user id, timestamp) of each target, in order."""
    return [
        (int(user), int(when))
        for batches in ranks
        for batch in batches
        for user, when in zip(batch.user_id_U[batch.user_T], batch.timestamp_T, strict=True)
    ]


def test_a_user_is_in_it_whole_and_whatever_files_ranks_order_and_seed(tmp_path: Path) -> None:
    one = written(tmp_path / "one", USERS)
    other = written(tmp_path / "other", USERS[::-1], users_per_row_group=11, row_groups_per_shard=2)
    chosen = targets(read(one, 0.3))
    users = {user for user, _ in chosen}
    # All targets of the users that are in it, and nothing of the others.
    expected = [
        (user.user_id, target.timestamp)
        for user in USERS
        for target in user.targets
        if target.split == Split.VALIDATION and user.user_id in users
    ]
    assert chosen == expected
    with_targets = {u.user_id for u in USERS if any(t.split == Split.VALIDATION for t in u.targets)}
    assert 0.15 < len(users) / len(with_targets) < 0.45
    for again in (
        read(one, 0.3, world=3),
        read(one, 0.3, seed=6, shuffle=True),
        read(other, 0.3),
        read(other, 0.3, world=2),
    ):
        assert sorted(targets(again)) == sorted(chosen)


def test_a_larger_sample_holds_a_smaller_one(tmp_path: Path) -> None:
    folder = written(tmp_path / "data", USERS)
    small, large, everything = (set(targets(read(folder, fraction))) for fraction in (0.1, 0.6, 1.0))
    assert small < large < everything


def test_no_user_at_all_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "data", USERS[:3] + random_users(8, seed=9, splits=[Split.VALIDATION]))
    with pytest.raises(UserError, match=r"fraction of 1e-09 leaves no user with targets in split validation"):
        read(folder, 1e-9)


def test_a_users_targets_share_a_batch_but_where_it_is_full(tmp_path: Path) -> None:
    """A batch searches a history once for all targets in it: in file order a user is cut by a batch's end alone."""
    folder = written(tmp_path / "data", USERS)
    for world in (1, 2):
        ranks = read(folder, 1.0, world=world)
        batches = [batch for of_rank in ranks for batch in of_rank if len(batch)]
        users = len({user for user, _ in targets(ranks)})
        assert all(len(batch) == SETTINGS.batch_size for of_rank in ranks for batch in of_rank[:-1])
        assert sum(batch.users for batch in batches) <= users + len(batches) - 1
