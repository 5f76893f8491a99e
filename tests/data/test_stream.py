"""The stream of batches: what is in them, ranks, resuming, order, threads."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from embeddings.batch import Batch
from jobs.app import app
from pipeline.stream.history_stream import HistoryStream
from schemas.shards import Split
from schemas.stream import StreamSettings
from tests.datasets import Target, User, random_users, write_dataset

BEHAVIORS, SCENES = ("click", "cart"), ("feed", "search", "ads")
USERS = random_users(60, behaviors=2, scenes=3)
SETTINGS = StreamSettings(batch_size=8, history_length=6, shuffle_memory=5000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream") / "data"
    write_dataset(folder, USERS, behaviors=BEHAVIORS, scenes=SCENES)
    return folder


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def stream(folder: Path, settings: StreamSettings = SETTINGS, **arguments: Any) -> HistoryStream:
    return HistoryStream(folder, **{"split": "train", "settings": settings, "seed": 5, "shuffle": True} | arguments)


def read(folder: Path, settings: StreamSettings = SETTINGS, **arguments: Any) -> list[Batch]:
    """An epoch's batches."""
    with stream(folder, settings, **arguments) as opened:
        return list(opened)


def targets_of(users: Iterable[User], split: Split) -> list[tuple[User, Target]]:
    return [(user, target) for user in users for target in user.targets if target.split == split]


def keys_of(batches: Iterable[Batch]) -> list[tuple[int, int]]:
    """(user id, timestamp) of each target, which names it."""
    return [
        (int(user), int(when))
        for batch in batches
        for user, when in zip(batch.user_id_U[batch.user_T], batch.timestamp_T, strict=True)
    ]


def assert_equal(one: Any, other: Any) -> None:
    """Bit for bit, in every field."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_equal(one[name], other[name])
    elif hasattr(one, "__dataclass_fields__"):
        for name in one.__dataclass_fields__:
            assert_equal(getattr(one, name), getattr(other, name))
    else:
        assert one == other


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("split", Split)
def test_batches_equal_a_slow_reference(folder: Path, split: Split, shuffle: bool) -> None:
    sequences = {
        "recent": {"length": 4},
        "carts": {"length": 3, "behavior": ["cart"]},
        "outside": {"length": 50, "scene": ["feed", "search"]},
        "ad_clicks": {"length": 2, "behavior": ["click"], "scene": ["ads"]},
    }
    wanted = {
        "recent": lambda behavior, scene: True,
        "carts": lambda behavior, scene: behavior == 2,
        "outside": lambda behavior, scene: scene in (1, 2),
        "ad_clicks": lambda behavior, scene: behavior == 1 and scene == 3,
    }
    settings = StreamSettings(batch_size=8, sequences=sequences, shuffle_memory=5000)
    expected = {(user.user_id, target.timestamp): (user, target) for user, target in targets_of(USERS, split)}
    seen = 0
    for batch in read(folder, settings, split=split.name.lower(), shuffle=shuffle):
        assert len(batch.user_id_U.unique()) == batch.users, "a user's history is in a batch once"
        for t, key in enumerate(keys_of([batch])):
            user, target = expected[key]
            seen += 1
            assert batch.item_T[t] == target.item
            assert batch.features_T["category"][t] == target.category
            assert batch.label_T[t] == target.label
            assert batch.features_T["scene"][t] == target.scene
            before = list(zip(user.item, user.category, user.timestamp, user.behavior, user.scene, strict=True))
            for name, belongs in wanted.items():
                history = batch.histories[name]
                window = slice(int(history.start_T[t]), int(history.end_T[t]))
                columns = (
                    history.item_M,
                    history.features_M["category"],
                    history.timestamp_M,
                    history.features_M["behavior"],
                    history.features_M["scene"],
                )
                shown = list(zip(*(column[window].tolist() for column in columns), strict=True))
                kept = [line for line in before[: target.history_end] if belongs(line[3], line[4])]
                assert shown == kept[-sequences[name]["length"] :]
                owner = int(batch.user_T[t])
                assert history.offset_U[owner] <= history.start_T[t] <= history.end_T[t] <= history.offset_U[owner + 1]
    assert seen == len(expected)


def test_history_holds_nothing_outside_of_its_targets_windows(folder: Path) -> None:
    for batch in read(folder):
        history = batch.histories["history"]
        for user in range(batch.users):
            of_user = batch.user_T == user
            assert history.offset_U[user] == history.start_T[of_user].min()
            assert history.offset_U[user + 1] == history.end_T[of_user].max()


@pytest.mark.parametrize("world", [1, 2, 3, 40])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_rank_makes_equal_steps_and_every_target_comes_once(tmp_path: Path, world: int, shuffle: bool) -> None:
    users = random_users(24, seed=world, splits=[Split.TRAIN, Split.TEST])
    write_dataset(tmp_path / "data", users, users_per_row_group=8)  # 3 row groups
    ranks = [read(tmp_path / "data", rank=rank, world=world, shuffle=shuffle) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [key for batches in ranks for key in keys_of(batches)]
    expected = [(user.user_id, target.timestamp) for user, target in targets_of(users, Split.TRAIN)]
    assert sorted(seen) == sorted(expected)
    if not shuffle:
        assert seen == expected, "evaluation keeps the order of the files"
    shares = [sum(map(len, batches)) for batches in ranks]
    assert max(shares) - min(shares) <= 1
    assert all(len(batch) == 8 for batches in ranks for batch in batches[:-1])


def test_rank_that_runs_out_gives_an_empty_batch(tmp_path: Path) -> None:
    behavior = {"item": [3], "category": [1], "timestamp": [5], "behavior": [1], "scene": [1]}
    target = Target(1, 1, 10, 1, Split.TRAIN, 1)
    write_dataset(tmp_path / "data", [User(1, **behavior, targets=[target])], behaviors=BEHAVIORS, scenes=SCENES)
    settings = StreamSettings(sequences={"a": {"length": 3}, "b": {"length": 3, "scene": ["feed"]}})
    (full,), (empty,) = (read(tmp_path / "data", settings, rank=rank, world=2) for rank in (1, 0))
    assert (len(full), full.users, len(empty), empty.users) == (1, 1, 0, 0)
    flat = [(t.dtype, t.dim()) for t in _tensors(empty)]
    assert flat == [(t.dtype, t.dim()) for t in _tensors(full)]


def _tensors(batch: Batch) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    batch._map(lambda tensor: tensors.append(tensor) or tensor)
    return tensors


@pytest.mark.parametrize("together", [None, 2])
def test_resuming_at_every_batch_equals_the_uninterrupted_stream(folder: Path, together: int | None) -> None:
    settings = SETTINGS.model_copy(update={"targets_per_user_per_batch": together})
    with stream(folder, settings, rank=1, world=2) as opened:
        epochs = [list(opened), list(opened)]
        everything = [batch for batches in epochs for batch in batches]
        steps = opened.steps_per_epoch
    assert len(everything) == 2 * steps > 10
    states: list[tuple[str, Batch]] = []
    with stream(folder, settings, rank=1, world=2) as opened:
        for _ in range(2):
            states += [(json.dumps(opened.state_dict()), batch) for batch in opened]
    for consumed, (state, last) in enumerate(states, 1):
        assert_equal(last, everything[consumed - 1])
        # Other threads and another prefetch than the state was taken with.
        other = settings.model_copy(update={"threads": 1 + consumed % 4, "prefetch_batches": 1 + consumed % 3})
        with stream(folder, other, rank=1, world=2) as opened:
            opened.load_state_dict(json.loads(state))
            assert (opened.epoch, opened.step) == divmod(consumed, steps)
            rest = everything[consumed:][: steps - consumed % steps]
            # After the last batch of all there is nothing to compare with; the stream would go on with epoch 2.
            for batch, expected in zip(opened, rest, strict=consumed < 2 * steps):
                assert_equal(batch, expected)


def test_a_broken_off_epoch_goes_on_where_it_stopped(folder: Path) -> None:
    whole = read(folder)
    with stream(folder) as opened:
        first = []
        for batch in opened:
            first.append(batch)
            if len(first) == 3:
                break
        assert (opened.epoch, opened.step) == (0, 3)
        for batch, expected in zip(first + list(opened), whole, strict=True):
            assert_equal(batch, expected)
        assert (opened.epoch, opened.step) == (1, 0)


def test_other_ranks_begin_an_epoch_as_if_they_had_always_been_there(folder: Path) -> None:
    with stream(folder) as two, stream(folder, rank=2, world=3) as three:
        list(two)
        three.load_state_dict(two.state_dict())
        assert (three.epoch, three.step) == (1, 0)
        assert three.change == "3 ranks instead of 1"
    with stream(folder, rank=2, world=3) as fresh:
        fresh.set_epoch(1)
        for batch, expected in zip(three, fresh, strict=True):
            assert_equal(batch, expected)
    three.close()


@pytest.mark.parametrize("together", [None, 2])
@pytest.mark.parametrize("sizes", [(8, 8, 8), (4, 8, 3)])
def test_other_ranks_go_on_within_an_epoch(folder: Path, sizes: tuple[int, ...], together: int | None) -> None:
    """2 ranks, then 1, then 3: every target once; each part can be left and gone on with, as an undisturbed epoch."""
    expected = sorted((user.user_id, target.timestamp) for user, target in targets_of(USERS, Split.TRAIN))
    seen: list[tuple[int, int]] = []
    state: dict[str, Any] = {}
    step = 0
    for world, size, steps in zip((2, 1, 3), sizes, (3, 2, None), strict=True):
        settings = SETTINGS.model_copy(update={"batch_size": size, "targets_per_user_per_batch": together})
        states, rest = [], len(expected) - len(seen)
        for rank in range(world):
            with stream(folder, settings, rank=rank, world=world) as opened:
                if state:
                    opened.load_state_dict(json.loads(json.dumps(state)))
                    assert (opened.epoch, opened.step) == (0, step)
                    assert f"{rest:,} targets of the epoch left, " in str(opened.change)
                left = opened.steps_of(0) - step
                batches, places = [], []
                for batch in opened:
                    batches.append(batch)
                    places.append(opened.state_dict())
                assert len(batches) == left > (steps or 0)
                assert (opened.epoch, opened.step) == (1, 0)
                assert opened.steps_of(1) == opened.steps_per_epoch
            # Left and gone on with in its middle, by the same ranks.
            with stream(folder, settings, rank=rank, world=world) as again:
                again.load_state_dict(places[0])
                assert again.change is None
                for batch, same in zip(again, batches[1:], strict=True):
                    assert_equal(batch, same)
            states.append(places[(steps or left) - 1])
            yours = batches[:steps]
            assert all(len(batch) == size for batch in yours[:-1])
            seen += keys_of(yours)
        assert all(each == states[0] for each in states), "it is the same on all ranks"
        state, step = states[0], step + (steps or left)
    assert sorted(seen) == expected
    assert state["epoch"] == 1
    assert "changes" not in state


@pytest.mark.parametrize(
    ("key", "changed"),
    [
        ("seed", {"seed": 6}),
        ("split", {"split": "test"}),
        ("shuffle", {"shuffle": False}),
        ("history_length", {"settings": SETTINGS.model_copy(update={"history_length": 7})}),
        ("shuffle_memory", {"settings": SETTINGS.model_copy(update={"shuffle_memory": 9000})}),
    ],
)
def test_state_of_another_stream_is_refused(folder: Path, key: str, changed: dict[str, Any]) -> None:
    state = stream(folder).state_dict()
    with pytest.raises(ValueError, match=f"cannot go on: {key} is"):
        stream(folder, **changed).load_state_dict(state)


def test_states_of_earlier_versions_still_load(folder: Path) -> None:
    """Nothing is compared that a state of a data set of version 2 did not say before there were other features."""
    sequences = {"carts": {"length": 5, "behavior": ["cart"]}}
    state = stream(folder, StreamSettings(sequences=sequences)).state_dict()
    own = {"data_set", "split", "seed", "shuffle", "order", "epoch", "step", "world"}
    former = {"batch_size", "history_length", "sequences", "targets_per_user_per_batch", "shuffle_memory"}
    assert set(state) == own | former
    assert state["sequences"] == {"carts": {"length": 5, "behavior": ["cart"], "scene": None}}


def test_state_of_another_data_set_is_refused(folder: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", USERS[1:], behaviors=BEHAVIORS, scenes=SCENES)
    with pytest.raises(ValueError, match="cannot go on: data_set is"):
        stream(tmp_path / "data").load_state_dict(stream(folder).state_dict())


def test_order_depends_on_seed_and_epoch_alone(folder: Path) -> None:
    plain = [read(folder, SETTINGS.model_copy(update={"threads": threads})) for threads in (1, 2, 5)]
    for other in plain[1:]:
        for batch, expected in zip(other, plain[0], strict=True):
            assert_equal(batch, expected)
    with stream(folder) as opened:
        epochs = [keys_of(opened) for _ in range(5)]
        assert opened.epoch == 5
    assert epochs[0] == keys_of(plain[0])
    assert len({tuple(keys) for keys in epochs}) == 5
    assert keys_of(read(folder, seed=6)) != epochs[0]


def test_shuffle_buffer_mixes_users_of_many_row_groups(folder: Path) -> None:
    row_group = {user.user_id: index // 4 for index, user in enumerate(USERS)}
    wide = read(folder, SETTINGS.model_copy(update={"shuffle_memory": 1 << 20}))
    narrow = read(folder, SETTINGS.model_copy(update={"shuffle_memory": 0}))

    def mixed(batches: list[Batch]) -> float:
        return sum(len({row_group[int(user)] for user in batch.user_id_U}) / batch.users for batch in batches[:-1])

    assert mixed(wide) > 1.5 * mixed(narrow)


@pytest.mark.parametrize("together", [1, 2])
def test_targets_of_a_user_are_spread(tmp_path: Path, together: int) -> None:
    users = random_users(80, most_targets=1, splits=[Split.TRAIN])
    users = [
        User(
            u.user_id,
            u.item,
            u.category,
            u.timestamp,
            [Target(1, 1, 10**6 + i, int(i == 0), Split.TRAIN, len(u.item)) for i in range(6)],
        )
        for u in users
    ]
    write_dataset(tmp_path / "data", users)
    settings = StreamSettings(batch_size=32, history_length=5)
    whole = read(tmp_path / "data", settings)
    assert max(int(batch.user_T.bincount().max()) for batch in whole) == 6
    spread = read(tmp_path / "data", settings.model_copy(update={"targets_per_user_per_batch": together}))
    assert max(int(batch.user_T.bincount().max()) for batch in spread) == together
    assert sorted(keys_of(spread)) == sorted(keys_of(whole))


def test_time_spent_waiting_is_measured(folder: Path) -> None:
    with stream(folder) as opened:
        assert opened.waited_s == 0
        list(opened)
        after_one = opened.waited_s
        assert after_one > 0
        list(opened)
        assert opened.waited_s > after_one


def test_stream_can_be_left_in_any_state(folder: Path) -> None:
    settings = SETTINGS.model_copy(update={"batch_size": 1, "prefetch_batches": 1})
    for consumed in (0, 1, 2):
        opened = stream(folder, settings)
        batches = iter(opened)
        for _ in range(consumed):
            next(batches)
        time.sleep(0.05)  # until the prefetch thread waits for room
        opened.close()
        opened.close()
        # An iteration that had begun is over; one that had not begins with a prefetch of its own.
        assert len(list(batches)) == (0 if consumed else opened.steps_per_epoch)
    forgotten = iter(stream(folder, settings))
    next(forgotten)
    time.sleep(0.05)
    del forgotten  # the fixture looks for its threads


def test_program_that_ends_amid_an_epoch_ends_well(folder: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from pipeline.stream.history_stream import HistoryStream; "
        "from schemas.stream import StreamSettings; "
        "settings = StreamSettings(batch_size=1, prefetch_batches=1); "
        "stream = HistoryStream(Path(sys.argv[1]), 'train', settings, seed=0, shuffle=True); "
        "batches = iter(stream); print(len(next(batches)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_command_counts_what_it_reads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app(["stream", str(folder), "batch_size=8", "--split", "test"], standalone_mode=False)
    targets = targets_of(USERS, Split.TEST)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == f"test: {len(targets)} targets in {-(-len(targets) // 8)} batches of 8"
    assert f"{sum(target.label for _, target in targets) / len(targets):.1%} positive" in last
    windows = sum(min(target.history_end, StreamSettings().history_length) for _, target in targets)
    assert f"stand for the {windows:,} that a row for each sample would hold" in last


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches(folder: Path) -> None:
    for batch in read(folder, pin_memory=True):
        assert all(tensor.is_pinned() for tensor in _tensors(batch) if tensor.numel())
