"""Generated histories: a user's depends on the settings and the user alone, so that any user can be made by itself.

Lengths follow a Pareto law between min_length and max_length. Times come in sessions: short gaps, now and then a long
one, stretched over the days that the settings give, each behaviour at a second of its own. With chance ``loyalty`` a
behaviour takes the category of a past one, drawn with weights that decay with age, otherwise a category by popularity:
interests begin, spread and die. The item is one of the category's, by popularity. The share that a past behaviour has
of the weights is its planted relevance to what follows.

U = users, E = their behaviours.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline.hashing import U64, mix
from pipeline.synth.catalog import F64, I64, Catalog, build_catalog, draw_item, draw_past, pick, uniform
from schemas.synth import DAY, SynthSettings

BEHAVIORS = ("pv", "cart", "fav", "buy")
BEHAVIOR_CHANCES = (0.895, 0.055, 0.03, 0.02)
SCENES = ("feed", "search", "detail")
SCENE_CHANCES = (0.6, 0.3, 0.1)

_PAUSE_CHANCE = 0.1
"""Chance that the gap before a behaviour is one between sessions."""
_PAUSE_FACTOR = 200.0
"""How many times longer such a gap is."""
_USERS_PER_SCAN = 1 << 16
"""Users whose lengths are drawn at a time."""

# What a random number is for: the salt of its hash.
_LENGTH, _GAP, _PAUSE, _LOYAL, _CATEGORY, _ITEM, _BEHAVIOR, _SCENE = range(8)


class Histories(NamedTuple):
    """Behaviours of some users, each user's together and in time order. Ids are raw ids."""

    user_id_U: I64
    start_U1: I64
    """(U + 1,): where each user's behaviours begin, and the end of the last one's."""
    item_id_E: I64
    category_id_E: I64
    timestamp_E: I64
    """Seconds; strictly growing within a user."""
    behavior_E: NDArray[np.int8]
    """Index into ``BEHAVIORS``."""
    scene_E: NDArray[np.int8]
    """Index into ``SCENES``."""

    def user_id_E(self) -> I64:
        """The user of each behaviour."""
        return np.repeat(self.user_id_U, np.diff(self.start_U1))


class _Law(NamedTuple):
    """The settings that a compiled function needs."""

    first_timestamp: int
    seconds: int
    loyalty: float
    decay_seconds: float
    behavior_chance: F64
    scene_chance: F64


class HistoryGenerator:
    """Makes histories of users 1, 2, 3, ...

    Example:
        >>> generator = HistoryGenerator(SynthSettings(seed=7))
        >>> generator.histories(np.array([3])).timestamp_E  # user 3's behaviours, whoever else is made
    """

    def __init__(self, settings: SynthSettings):
        self.settings = settings
        self.catalog = build_catalog(settings)
        self._law = _Law(
            settings.first_timestamp,
            settings.days * DAY,
            settings.loyalty,
            settings.decay_days * DAY,
            np.cumsum(BEHAVIOR_CHANCES),
            np.cumsum(SCENE_CHANCES),
        )

    def keys(self, user_id_U: I64) -> U64:
        """The random key of each user."""
        return mix(mix(np.asarray(user_id_U), self.settings.seed), 0)

    def lengths(self, user_id_U: I64) -> I64:
        """Draw the number of behaviours of each user."""
        low, high, tail = self.settings.min_length, self.settings.max_length + 1, self.settings.length_tail
        uniform_U = (mix(self.keys(user_id_U), _LENGTH) >> np.uint64(11)) * 2.0**-53
        # The inverse of the distribution function of a Pareto law that is cut off at ``high``.
        length_U = low * (1 - uniform_U * (1 - (low / high) ** tail)) ** (-1 / tail)
        clipped_U: I64 = np.clip(length_U.astype(np.int64), low, self.settings.max_length)
        return clipped_U

    def count(self) -> tuple[int, int]:
        """Count the users that it takes to have ``settings.events`` behaviours, and the behaviours that these have."""
        users = events = 0
        while True:
            total_U = events + np.cumsum(self.lengths(np.arange(users + 1, users + 1 + _USERS_PER_SCAN)))
            position = int(np.searchsorted(total_U, self.settings.events))
            if position < _USERS_PER_SCAN:
                return users + position + 1, int(total_U[position])
            users, events = users + _USERS_PER_SCAN, int(total_U[-1])

    def stream(self, users: int, events: int = 1 << 18) -> Iterator[Histories]:
        """Make the histories of users 1 to ``users``, in runs of about ``events`` behaviours; a run has whole users."""
        for first in range(1, users + 1, _USERS_PER_SCAN):
            user_id_U = np.arange(first, min(first + _USERS_PER_SCAN, users + 1))
            # Runs have about equal numbers of behaviours, not of users: lengths differ by orders of magnitude.
            run_U = np.cumsum(self.lengths(user_id_U)) // events
            for run in np.split(user_id_U, np.flatnonzero(np.diff(run_U)) + 1):
                yield self.histories(run)

    def histories(self, user_id_U: I64) -> Histories:
        """Make the histories of these users, in this order."""
        user_id_U = np.asarray(user_id_U, np.int64)
        start_U1 = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths(user_id_U))])
        events = int(start_U1[-1])
        histories = Histories(
            user_id_U,
            start_U1,
            np.empty(events, np.int64),
            np.empty(events, np.int64),
            np.empty(events, np.int64),
            np.empty(events, np.int8),
            np.empty(events, np.int8),
        )
        _fill(histories, self.keys(user_id_U), self._law, self.catalog)
        return histories


@numba.njit
def _fill(histories: Histories, key_U: U64, law: _Law, catalog: Catalog) -> None:
    for user in range(len(key_U)):
        key = key_U[user]
        start = histories.start_U1[user]
        length = histories.start_U1[user + 1] - start
        timestamps = histories.timestamp_E[start : start + length]
        _fill_timestamps(timestamps, key, law)
        categories = histories.category_id_E[start : start + length]
        # decay[j]: by what factor weights fall from behaviour j - 1 to behaviour j.
        decay = np.ones(length)
        total = 0.0  # Sum of the weights of all behaviours before j, where that of j - 1 is 1.
        for j in range(length):
            if j > 0:
                decay[j] = np.exp((timestamps[j - 1] - timestamps[j]) / law.decay_seconds)
                total = 1 + total * decay[j - 1]
            draw = uniform(key, j, _CATEGORY)
            if j > 0 and uniform(key, j, _LOYAL) < law.loyalty:
                categories[j] = categories[draw_past(decay, j, draw * total)]
            else:
                categories[j] = pick(catalog.cumulative_C, draw) + 1
            histories.item_id_E[start + j] = draw_item(catalog, categories[j], uniform(key, j, _ITEM))
            histories.behavior_E[start + j] = pick(law.behavior_chance, uniform(key, j, _BEHAVIOR))
            histories.scene_E[start + j] = pick(law.scene_chance, uniform(key, j, _SCENE))


@numba.njit(inline="always")
def _fill_timestamps(timestamps: I64, key: np.uint64, law: _Law) -> None:
    length = len(timestamps)
    elapsed = np.empty(length)
    total = 0.0
    for j in range(length + 1):
        gap = -np.log(1 - uniform(key, j, _GAP))
        # Before the first and after the last behaviour nothing is known: long gaps.
        if j == 0 or j == length or uniform(key, j, _PAUSE) < _PAUSE_CHANCE:
            gap *= _PAUSE_FACTOR
        total += gap
        if j < length:
            elapsed[j] = total
    for j in range(length):
        # Stretched to the whole time less a second for each behaviour, which ``j`` gives back: no two share one.
        timestamps[j] = law.first_timestamp + j + int(elapsed[j] / total * (law.seconds - length))
