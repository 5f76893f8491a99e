"""The days of an online run: data sets of one chain, each of which continues the one before it."""

import glob
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pipeline.paths import location
from pipeline.stream.data_set import DataSet, encoding
from schemas.errors import UserError
from schemas.manifest import MANIFEST, Chain, Manifest
from schemas.online import LearntDay
from schemas.storage import RemotePath

_LOGGER = logging.getLogger("dare.online")
"""Shown by the first rank alone."""


@dataclass(frozen=True)
class Day:
    """A data set of a chain."""

    folder: Path
    manifest: Manifest
    fingerprint: str

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read what a folder says of its day.

        Raises:
            UserError: it is no data set, or not one of a chain.
        """
        data_set = DataSet.open(folder)
        if data_set.manifest.chain is None:
            raise UserError(
                f"{folder}: no day can follow this data set; prepare the first day with history.keep, and each further "
                "one with --extend"
            )
        if data_set.manifest.without_events:
            raise UserError(
                f"{folder}: it has impressions alone, to be scored, and is no day to learn from; prepare the day with "
                "its events"
            )
        if not folder.name or folder.name.startswith("."):
            raise UserError(f"{folder}: a day's folder needs a name of its own, which its run will have too")
        return cls(folder, data_set.manifest, data_set.fingerprint)

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @property
    def chain(self) -> Chain:
        """What it knows of the days before it."""
        assert self.manifest.chain is not None
        return self.manifest.chain

    @property
    def before(self) -> tuple[str, ...]:
        """Fingerprints of the days before it, the first one first."""
        return tuple(day.fingerprint for day in self.chain.days)

    @property
    def origin(self) -> str:
        """The fingerprint of the chain's day 0."""
        return (*self.before, self.fingerprint)[0]

    @property
    def targets(self) -> int:
        """Targets that can be learnt."""
        return self.manifest.counts.train.targets

    def record(self) -> LearntDay:
        """What is written down of the day; nothing yet of what was learnt."""
        return LearntDay(
            name=self.name,
            number=self.chain.number,
            fingerprint=self.fingerprint,
            chain=self.origin,
            first_timestamp=self.chain.first_timestamp,
            last_timestamp=self.chain.last_timestamp,
            targets=self.targets,
        )


def folders_of(names: Sequence[str]) -> list[Path]:
    """The folders that settings name, in their order; those of a pattern by the number of their day.

    Raises:
        UserError: a pattern matches no data set, or the same folder comes twice.
    """
    folders: list[Path] = []
    for name in names:
        path = location(name)
        # What is there comes first: a folder may have brackets or a star in its name.
        if isinstance(path, RemotePath) or path.exists() or not glob.has_magic(name):
            folders.append(path)
            continue
        found = [each for each in map(Path, glob.glob(name, recursive=True)) if (each / MANIFEST).is_file()]
        if not found:
            raise UserError(f"days: {name}: no folder with a data set matches")
        days = [Day.open(each) for each in found]
        folders += [day.folder for day in sorted(days, key=lambda day: (day.chain.number, day.folder))]
    for index, folder in enumerate(folders):
        if folder in folders[:index]:
            raise UserError(f"days: {folder} is named twice; a day is learnt once")
    return folders


def listed_days(names: Sequence[str], learnt: Sequence[LearntDay], first: str | None) -> list[Day]:
    """The days that settings name and that are still to be learnt, made sure to follow each other.

    A day that is done may be gone.

    Args:
        names: folders or patterns.
        learnt: days that are done.
        first: fingerprint of the data set that the first day follows; None: any day may be the first.

    Raises:
        UserError: a day is no data set of the chain, comes twice or out of order, or has changed since it was learnt.
    """
    done, days, names_seen = {day.name: day for day in learnt}, list[Day](), dict[str, Path]()
    by_fingerprint: dict[str, Path] = {}
    for folder in folders_of(names):
        if folder.name in names_seen:
            raise UserError(
                f"days: {names_seen[folder.name]} and {folder} have one name, which their runs would have too; "
                "name one of them otherwise"
            )
        names_seen[folder.name] = folder
        known = done.get(folder.name)
        if known is not None and not (folder / MANIFEST).is_file():
            continue
        day = Day.open(folder)
        if day.fingerprint in by_fingerprint:
            raise UserError(f"days: {by_fingerprint[day.fingerprint]} and {folder} are the same day; leave one out")
        by_fingerprint[day.fingerprint] = folder
        if known is not None:
            if known.fingerprint != day.fingerprint:
                raise UserError(
                    f"{folder} has changed since day {known.number} was learnt from it; put back what it was, "
                    "or begin anew in another folder"
                )
            if days:
                raise UserError(f"days: {folder} is learnt already, and comes after {days[-1].folder}, which is not")
            continue
        if days:
            refuse_stranger(day, days[-1].record(), str(days[-1].folder))
            refuse_other_features(day, days[-1])
        elif learnt:
            refuse_stranger(day, learnt[-1], learnt[-1].name)
        elif first is not None and day.before[-1:] != (first,):
            raise UserError(f"{folder}: does not continue the data set that the run of `first` was trained on")
        days.append(day)
    return days


def refuse_stranger(day: Day, last: LearntDay, name: str) -> None:
    """Make sure that a day continues the last one.

    Args:
        day: that is to be learnt.
        last: the day before it.
        name: what that one is called.

    Raises:
        UserError: it does not; says whether days are missing, out of order, or of different chains.
    """
    if day.before[-1:] == (last.fingerprint,):
        return
    if day.fingerprint == last.fingerprint:
        raise UserError(f"days: {day.folder} and {name} are the same day; leave one out")
    if last.fingerprint in day.before:
        missing = day.chain.number - last.number - 1
        raise UserError(
            f"{day.folder}: is day {day.chain.number}, and {name} before it is day {last.number}: "
            f"{missing} day{'s' if missing > 1 else ''} between them missing"
        )
    if day.origin == last.chain and day.chain.number == last.number:
        raise UserError(
            f"{day.folder} and {name} are both day {last.number} of the chain, and neither continues the other; give "
            "one of them"
        )
    if day.origin == last.chain and day.chain.number < last.number:
        raise UserError(
            f"{day.folder}: is day {day.chain.number}, and comes after {name}, day {last.number}; days must be in order"
        )
    raise UserError(
        f"{day.folder}: is day {day.chain.number} of another chain, and does not continue {name}; prepare it with "
        "--extend of that data set"
    )


def refuse_other_features(day: Day, last: Day) -> None:
    """Make sure that two days have the same features and labels.

    Raises:
        UserError: they have not; names the features.
    """
    one, other = described(day.manifest), described(last.manifest)
    if differing := [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]:
        raise UserError(f"{day.folder}: {', '.join(differing)}: other than in {last.folder}; a chain's days are alike")


def described(manifest: Manifest) -> dict[str, object]:
    """What must be the same in all days of a chain, by a name for people."""
    features = {feature.name: (feature.of, feature.target, encoding(feature)) for feature in manifest.declared}
    return {
        **features,
        "labels": manifest.labels,
        "schema version": manifest.schema_version,
        "type of users": manifest.user_type,
        "type of items": manifest.item_type,
    }


LOOKS = 3
"""A fault of a folder is told of when it is the same at so many looks: what is being copied changes meanwhile."""
_State = tuple[tuple[str, int, int], ...]


class Arrivals:
    """Data sets that come into a folder one after the other. One that is not whole is not there yet.

    Args:
        folder: where they come.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"--follow {folder}: no such folder")
        self._folder = folder
        self._opened: dict[tuple[Path, int, int], Day] = {}
        self._faults: dict[Path, tuple[str, int]] = {}
        self._verified: dict[Path, tuple[_State, str | None]] = {}
        self._told: set[str] = set()

    def next(self, learnt: Sequence[LearntDay], first: str | None) -> Day | None:
        """The day that continues the last one, if it is there; what never will is told once.

        Args:
            learnt: days that are done.
            first: fingerprint of the data set that the first day follows; None: the earliest that is there comes first.

        Raises:
            UserError: two days continue the last one, or the next one has the name of one that is done.
        """
        whole, done = self._whole(), {day.fingerprint for day in learnt}
        days = [day for day in whole if day.fingerprint not in done]
        # Of what others continue, nothing is to be said: it is older than the first day that is learnt, or will come.
        older = {fingerprint for day in whole for fingerprint in day.before}
        last = learnt[-1].fingerprint if learnt else first
        if last is None:
            days.sort(key=lambda day: day.chain.number)
            following = [day for day in days if day.chain.number == days[0].chain.number]
        else:
            following = [day for day in days if day.before[-1:] == (last,)]
            for day in days:
                if last not in day.before and day.fingerprint not in older:
                    self._tell(f"{day.folder}: day {day.chain.number}, which does not continue the last one; left out")
        if len(following) > 1:
            raise UserError(
                f"{following[0].folder} and {following[1].folder} are both the next day; take one of them away"
            )
        for day in following:
            if any(day.name == other.name for other in learnt):
                raise UserError(f"{day.folder}: a day of this name is learnt already; give the folder another name")
        return following[0] if following and self._is_whole(following[0]) else None

    def _is_whole(self, day: Day) -> bool:
        """Whether all files of a day are what its manifest says: copies may have their size before their content."""
        try:
            # A fault is looked for again when a file has changed.
            state = tuple(
                (path.name, entry.st_size, entry.st_mtime_ns)
                for path in sorted(day.folder.iterdir())
                for entry in [path.stat()]
            )
            known = self._verified.get(day.folder)
            if known is None or known[0] != state:
                known = state, None
                try:
                    day.manifest.verify(day.folder)
                except UserError as error:
                    known = state, str(error)
                self._verified[day.folder] = known
        except OSError as error:
            known = (), f"{day.folder}: cannot be read ({error.strerror})"
        self._look(day.folder, known[1])
        return known[1] is None

    def _whole(self) -> list[Day]:
        """All data sets that are whole."""
        days = []
        try:
            folders = sorted(self._folder.iterdir())
        except OSError as error:
            raise UserError(f"--follow {self._folder}: cannot be read any more ({error.strerror})") from None
        for folder in folders:
            manifest = folder / MANIFEST
            if folder.name.startswith(".") or not manifest.is_file():
                continue
            try:
                state = manifest.stat()
                key = folder, state.st_mtime_ns, state.st_size
                if key not in self._opened:
                    self._opened[key] = Day.open(folder)
            except FileNotFoundError:
                # It is being renamed or removed at this moment.
                continue
            except OSError as error:
                self._look(folder, f"{folder}: cannot be read ({error.strerror})")
                continue
            except UserError as error:
                # Perhaps it is being copied, the manifest first: it is looked at again.
                self._look(folder, str(error))
                continue
            days.append(self._opened[key])
        return days

    def _look(self, folder: Path, fault: str | None) -> None:
        """Tell of a fault that stays; None: there is none."""
        if fault is None:
            self._faults.pop(folder, None)
            return
        former, looks = self._faults.get(folder, ("", 0))
        looks = looks + 1 if former == fault else 1
        self._faults[folder] = fault, looks
        if looks == LOOKS:
            self._tell(f"not taken as it is: {fault}; the run waits until it is whole")

    def _tell(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            _LOGGER.warning("%s", line)
