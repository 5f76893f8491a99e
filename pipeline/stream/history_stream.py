"""The stream of batches that training and evaluation read."""

from collections.abc import Collection, Generator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from embeddings.batch import Batch
from pipeline.stream.batches import Reading, UserSample, cut_batches, read_blocks, sampled_targets
from pipeline.stream.data_set import BUILT_IN, DataSet
from pipeline.stream.epoch_plan import (
    ORDER,
    Block,
    Change,
    EpochPlan,
    order_of,
    plan_epoch,
    steps_per_epoch,
    targets_left,
)
from pipeline.stream.prefetch import Prefetch
from pipeline.stream.samples import HistorySamples, Items, resolve_sequences
from schemas.errors import UserError
from schemas.shards import SPLITS, Split
from schemas.stream import StreamSettings

if TYPE_CHECKING:
    # Most runs need neither.
    from pipeline.stream.negatives import Negatives
    from pipeline.stream.translation import Translation


class HistoryStream:
    """Batches of one split for one rank, epoch after epoch.

    ``for batch in stream`` gives the batches that are left of the current epoch, ``steps_per_epoch`` if none was taken,
    and leaves the stream at the start of the next. Over all ranks each target of the split (of its sample of users)
    comes exactly once an epoch.
    All ranks make the same number of steps; a rank's last batch may be short, or empty. An epoch is decided by the
    data set, the settings, ``seed``, ``epoch``, ``rank`` and ``world`` alone, not by threads or what was read before;
    where other ranks go on within it (`load_state_dict`), by the steps that were made with each number of them, too.

    Args:
        folder: the data set.
        split: ``train``, ``validation`` or ``test``.
        settings: how batches are made.
        seed: decides the shuffle.
        shuffle: a new order each epoch; otherwise the order of the files, a user's targets together (for evaluation).
        rank: which of the ``world`` readers this is.
        world: number of readers that share the split.
        pin_memory: put batches into page-locked memory, for copies to a CUDA device that do not block.
        user_fraction: about what part of the users is read, above 0; always the same ones. Below 1 two columns of the
            split are read at once, to count their targets.
        features: names of the features that batches have, beside those that sequences are cut by; None: all.
        lines: read which lines of the impressions the targets are, where the data set says so.
        translation: gives batches the ids of another data set; None: they have those of this one.
        whole_histories: batches say how long the targets' whole histories are, and when they began.

    Raises:
        UserError: no data set, one that does not fit its manifest or the settings, a split without targets; while
            iterating: a shard that cannot be read or does not hold what the manifest says.

    Example:
        >>> with HistoryStream(folder, "train", StreamSettings(), seed=1, shuffle=True) as stream:
        ...     while stream.epoch < 2:
        ...         for batch in stream:
        ...             train_step(batch)
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        settings: StreamSettings,
        *,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world: int = 1,
        pin_memory: bool = False,
        user_fraction: float = 1.0,
        features: Collection[str] | None = None,
        lines: bool = False,
        translation: "Translation | None" = None,
        whole_histories: bool = False,
    ) -> None:
        if split not in SPLITS:
            raise UserError(f"split must be one of {', '.join(SPLITS)} (not {split!r})")
        # Also where no launcher counts: a rank out of range would read nothing, in silence.
        if not 0 <= rank < world:
            raise UserError(f"rank must be at least 0 and below world = {world} (not {rank})")
        # The index alone: no shard is opened before the first batch is asked for.
        self.data_set = DataSet.open(folder)
        self.split = split
        self.settings = settings
        self.epoch = 0
        """The epoch of the next batch, from 0."""
        self.step = 0
        """The next batch's number in its epoch, from 0."""
        self.change: str | None = None
        """What is another one than in the state that was loaded, in words; None: nothing."""
        self._changed_epoch, self._changes = 0, tuple[Change, ...]()
        self._seed, self._shuffle, self._rank, self._world = seed, shuffle, rank, world
        self._pin_memory, self._features = pin_memory, None if features is None else set(features) - BUILT_IN
        sample = UserSample(user_fraction)
        self._reading = replace(self._what_to_read(sample, lines, translation), whole_histories=whole_histories)
        self._targets_G = self.data_set.targets_G[split]
        self._prefetch: Prefetch[Batch] | None = None
        self._waited_s = 0.0
        if not self.targets:
            counts = ", ".join(f"{name} {int(count_G.sum())}" for name, count_G in self.data_set.targets_G.items())
            raise UserError(f"{folder}: no targets to stream in split {split} (targets: {counts})")
        if user_fraction < 1:
            self._targets_G = sampled_targets(self.data_set, Split[split.upper()], sample, settings.threads)
        if self._reading.negatives is not None:
            self._targets_G = self._reading.negatives.targets(self._targets_G)

    @property
    def targets(self) -> int:
        """Targets of the split, or of its sample of users, over all ranks."""
        return int(self._targets_G.sum())

    @property
    def translation(self) -> "Translation | None":
        """What gives batches the ids of another data set; None: they have those of this one."""
        return self._reading.translation

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch that these ranks read from its beginning, the same for every rank."""
        return steps_per_epoch(self.targets, self._world, self.settings.batch_size)

    def steps_of(self, epoch: int) -> int:
        """Batches in an epoch, the same for every rank, with those of other ranks that began it."""
        return steps_per_epoch(self.targets, self._world, self.settings.batch_size, self.changes(epoch))

    def changes(self, epoch: int) -> tuple[Change, ...]:
        """How other ranks, or these with batches of another size, read the beginning of an epoch; mostly nobody did."""
        return self._changes if epoch == self._changed_epoch else ()

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for batches so far: time that a faster reader would save."""
        return self._waited_s + (self._prefetch.waited_s if self._prefetch else 0.0)

    def __iter__(self) -> Iterator[Batch]:
        # An iteration that was left half-way still has its thread.
        self.close()
        epoch, step = self.epoch, self.step
        # The thread is given its place as values: ``epoch`` and ``step`` of the stream are the consumer's, and change
        # while the thread is ahead of it.
        with Prefetch(self._batches(epoch, step), self.settings.prefetch_batches) as prefetch:
            self._prefetch = prefetch
            for batch in prefetch:
                step += 1
                # Counted before the batch is handed out: a state that is taken while the consumer has it goes on after
                # it.
                self.epoch, self.step = (epoch, step) if step < self.steps_of(epoch) else (epoch + 1, 0)
                yield batch
        # Closed from elsewhere, or done: either way the next iteration begins where this one stopped.

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch."""
        self.close()
        self.epoch, self.step, self._changes = epoch, 0, ()

    def state_dict(self) -> dict[str, Any]:
        """Where the consumer is (not the prefetch), and what must be the same to go on; it is equal on all ranks."""
        return self.state_at(self.epoch, self.step)

    def state_at(self, epoch: int, step: int) -> dict[str, Any]:
        """Return the state of a consumer who is at another place, before batch ``step`` of an epoch."""
        changes = [list(change) for change in self.changes(epoch)] if step else []
        # Only where there are some: states were saved before an epoch could change its ranks.
        beginning = {"changes": changes} if changes else {}
        return {"epoch": epoch, "step": step, "world": self._world, **beginning, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the batch after the last one that was consumed when ``state`` was taken.

        Within an epoch other ranks, or these with batches of another size, go on with the targets that nobody has had.

        Raises:
            UserError: the state is of another data set, split, seed or of other settings.
        """
        # What is only said where there is such a setting must not be there without one.
        for key, mine in ({"negatives": None, "user_fraction": None} | self._identity()).items():
            if key != "batch_size" and state.get(key) != mine:
                raise UserError(
                    f"the stream cannot go on: {key} is {mine!r}, but was {state.get(key)!r} when its state was saved; "
                    "use the same, or start the stream afresh"
                )
        self.close()
        self.epoch, self.step = state["epoch"], state["step"]
        changes = [Change(*change) for change in state.get("changes", ())]
        former = Change(state["world"], state["batch_size"], self.step - sum(change.steps for change in changes))
        differs = former[:2] != (self._world, self.settings.batch_size)
        # No steps: an epoch's start, or ranks that ended before they had taken anything.
        if differs and former.steps:
            changes.append(former)
        self._changed_epoch, self._changes = self.epoch, tuple(changes)
        self.change = self._what_changed(former) if differs else None

    def close(self) -> None:
        """End all threads. The stream keeps its step and can be iterated again."""
        if self._prefetch is not None:
            self._prefetch.close()
            self._waited_s += self._prefetch.waited_s
            self._prefetch = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _what_changed(self, former: Change) -> str:
        def number(count: int, noun: str) -> str:
            return f"{count:,} {noun}{'s' if count != 1 else ''}"

        said = []
        if former.world != self._world:
            said.append(f"{number(self._world, 'rank')} instead of {former.world:,}")
        if former.batch_size != self.settings.batch_size:
            said.append(f"batches of {number(self.settings.batch_size, 'target')} instead of {former.batch_size:,}")
        if not self.step:
            return " and ".join(said)
        left, steps = targets_left(self.targets, self._changes), self.steps_of(self.epoch) - self.step
        return f"{' and '.join(said)} ({number(left, 'target')} of the epoch left, {number(steps, 'step')})"

    def _what_to_read(self, sample: UserSample, lines: bool, translation: "Translation | None") -> Reading:
        data_set, features = self.data_set, self._features
        if features is not None:
            features |= {name for cut in (self.settings.sequences or {}).values() for name in cut.conditions}
        known_I, largest = data_set.item_places(), data_set.manifest.largest_item
        of_items, self._bags, ids = data_set.item_features(features), data_set.bags(features), data_set
        if translation is not None:
            of_items, self._bags, ids = translation.of_items(of_items), translation.bags, translation.trained
            known_I, largest = translation.ids["item"], translation.trained.manifest.largest_item
        # Raw values of the sequences' conditions become ids that the batches will have.
        cuts = resolve_sequences(self.settings, ids, self._bags)
        for name in features or ():
            data_set.feature(name)
        return Reading(
            data_set,
            Split[self.split.upper()],
            data_set.schema(lines=lines, features=features),
            cuts,
            Items(of_items, largest, known_I is not None or largest < data_set.manifest.counts.items, known_I),
            sample,
            translation,
            self._negatives(),
        )

    def _negatives(self) -> "Negatives | None":
        if self.settings.negatives is None or self.split != "train":
            return None
        # Loaded by the runs that use it alone.
        from pipeline.stream.negatives import Negatives

        return Negatives.of(self.settings.negatives, self.data_set, self._seed)

    def _identity(self) -> dict[str, Any]:
        """What decides the batches of an epoch: it must not change between saving a state and going on from it."""
        # They change how fast batches come, not which.
        settings = self.settings.model_dump(mode="json", exclude={"threads", "prefetch_batches"})
        # Only where there is one: states were saved before there were such settings.
        if settings["negatives"] is None:
            del settings["negatives"]
        for sequence in (settings["sequences"] or {}).values():
            if sequence["where"] is None:
                del sequence["where"]
        return {
            "data_set": self.data_set.fingerprint,
            "split": self.split,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "order": ORDER,
            # Likewise.
            **({"user_fraction": self._reading.sample.fraction} if self._reading.sample.fraction < 1 else {}),
            # How much fits into the shuffle buffer decides the order, and which features are read decides that.
            **({"row_bytes": list(self._bytes())} if self.data_set.manifest.schema_version >= 3 else {}),
            **settings,
        }

    def _plan(self, epoch: int) -> EpochPlan:
        targets_G, behaviors_G = self._targets_G, self.data_set.behaviors_G
        behavior, target, user = self._bytes()
        # What a row group takes at most: a sequence keeps no more behaviours than the users have, and no more than N
        # for each target.
        bytes_G = targets_G * target + self.data_set.users_G * user
        for cut in self._reading.cuts.values():
            bytes_G = bytes_G + behavior * np.minimum(behaviors_G, targets_G * cut.length)
        return plan_epoch(
            targets_G,
            bytes_G,
            # One block is in use while the next is read; putting that one together takes as much again.
            self.settings.shuffle_memory // 3,
            shuffle=self._shuffle,
            seed=self._seed,
            epoch=epoch,
            rank=self._rank,
            world=self._world,
            changes=self.changes(epoch),
        )

    def _bytes(self) -> tuple[int, int, int]:
        """What a behaviour of a sequence, a target and a user take in the shuffle buffer."""
        if self.data_set.manifest.schema_version < 3:
            # As it was counted when these versions were written: another number would be another order of an epoch.
            return 4 * (len(self.data_set.largest_ids()) + 2), 0, 0  # int32 ids and an int64 timestamp
        empty = self._reading.no_samples()
        windows = list(empty.sequences.values())

        def size(columns: Mapping[str, NDArray[Any]]) -> int:
            return sum(column.itemsize for column in columns.values())

        # Beside the columns: start and end of each window and the user's row, the user's id and offsets.
        return size(windows[0].columns_M), size(empty.columns_T) + 8 + 16 * len(windows), size(empty.columns_U) + 16

    def _batches(self, epoch: int, step: int) -> Generator[Batch, None, None]:
        """Batches of an epoch from ``step`` on; runs in the prefetch thread."""
        batch_size, steps = self.settings.batch_size, self.steps_of(epoch)
        first_target = (step - sum(change.steps for change in self.changes(epoch))) * batch_size
        # Blocks before the first batch are left out: going on within an epoch reads nothing twice.
        blocks = tuple(block for block in self._plan(epoch).blocks if block.start + block.targets > first_target)

        def order(block: Block, samples: HistorySamples) -> NDArray[np.int64]:
            if not self._shuffle:
                return np.arange(len(samples))
            return order_of(block, samples.user_T, self.settings.targets_per_user_per_batch, self._seed, epoch)

        read = read_blocks(self._reading, blocks, self.settings.threads, epoch)
        try:
            for samples in cut_batches(read, order, batch_size, first_target):
                yield self._to_batch(samples, epoch, step)
                step += 1
        finally:
            # Now, not when the garbage collector finds the generator: it ends the reader's threads.
            read.close()
        # A rank with a batch less than others makes the step too, with nothing in it: the others' collectives wait for
        # it.
        while step < steps:
            yield self._to_batch(self._reading.no_samples(), epoch, step)
            step += 1

    def _to_batch(self, samples: HistorySamples, epoch: int, step: int) -> Batch:
        batch = samples.batch(
            f"{self.data_set.folder.name} {self.split}, epoch {epoch}, step {step}, rank {self._rank} of {self._world}",
            self.data_set.manifest.labels,
            self._bags,
        )
        return batch.pin_memory() if self._pin_memory else batch
