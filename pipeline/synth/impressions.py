"""Generated impressions: what was shown to a user, a label drawn with a known chance, and the AUC of these chances.

Half of what is shown comes from categories of the user's past behaviours, by relevance, the other half by popularity.
The chance of a click grows with the relevance of the category. Impressions do not change histories.

U = users, J = impressions of each.
"""

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline.hashing import U64
from pipeline.synth.catalog import F64, I64, Catalog, draw_item, draw_past, pick, uniform
from pipeline.synth.histories import SCENE_CHANCES, Histories, HistoryGenerator
from schemas.synth import DAY

_PERSONAL_CHANCE = 0.5
"""Chance that an impression is of a category of the user's past."""
_LAST_SECONDS = 3600
"""After a user's last behaviour, impressions lie within so many seconds."""

# What a random number is for: the salt of its hash, apart from those of the histories.
_PLACE, _SECOND, _PERSONAL, _CATEGORY, _ITEM, _SCENE, _CLICK = range(32, 39)


class Impressions(NamedTuple):
    """Impressions of some users, ``impressions_per_user`` each. Ids are raw ids."""

    user_id_UJ: I64
    item_id_UJ: I64
    category_id_UJ: I64
    timestamp_UJ: I64
    """Seconds; later than the user's first behaviour."""
    label_UJ: NDArray[np.int8]
    click_probability_UJ: F64
    """The chance that the label was drawn with."""
    scene_UJ: NDArray[np.int8]
    """Index into ``histories.SCENES``."""


class _Law(NamedTuple):
    """The settings that a compiled function needs."""

    decay_seconds: float
    click_floor: float
    click_ceiling: float
    click_half: float
    scene_chance: F64


def draw_impressions(generator: HistoryGenerator, histories: Histories) -> Impressions:
    """Draw impressions for the users of ``histories``, which ``generator`` made."""
    settings = generator.settings
    shape = (len(histories.user_id_U), settings.impressions_per_user)
    # Arrays to be filled by compiled code.
    impressions = Impressions(
        np.repeat(histories.user_id_U[:, None], shape[1], axis=1),
        np.empty(shape, np.int64),
        np.empty(shape, np.int64),
        np.empty(shape, np.int64),
        np.empty(shape, np.int8),
        np.empty(shape, np.float64),
        np.empty(shape, np.int8),
    )
    law = _Law(
        settings.decay_days * DAY,
        settings.click_floor,
        settings.click_ceiling,
        settings.click_half,
        np.cumsum(SCENE_CHANCES),
    )
    _fill(impressions, histories, generator.keys(histories.user_id_U), law, generator.catalog)
    return impressions


@numba.njit
def _fill(impressions: Impressions, histories: Histories, key_U: U64, law: _Law, catalog: Catalog) -> None:
    for user in range(len(key_U)):
        key = key_U[user]
        start, end = histories.start_U1[user], histories.start_U1[user + 1]
        timestamps = histories.timestamp_E[start:end]
        past_categories = histories.category_id_E[start:end]
        length = end - start
        # decay[j]: by what factor weights fall from behaviour j - 1 to behaviour j.
        decay = np.ones(length)
        for j in range(1, length):
            decay[j] = np.exp((timestamps[j - 1] - timestamps[j]) / law.decay_seconds)
        for j in range(impressions.label_UJ.shape[1]):
            # At a random place of the history: behind at least one behaviour, before the next one.
            before = 1 + int(uniform(key, j, _PLACE) * length)
            earliest = timestamps[before - 1] + 1
            latest = timestamps[before] if before < length else earliest + _LAST_SECONDS
            draw = uniform(key, j, _CATEGORY)
            if uniform(key, j, _PERSONAL) < _PERSONAL_CHANCE:
                total, _ = _weights(decay, past_categories, before, 0)
                category = past_categories[draw_past(decay, before, draw * total)]
            else:
                category = pick(catalog.cumulative_C, draw) + 1
            # The relevance of what is shown, whoever has chosen it, decides the chance of a click.
            total, relevant = _weights(decay, past_categories, before, category)
            relevance = relevant / total
            chance = law.click_floor + (law.click_ceiling - law.click_floor) * relevance / (relevance + law.click_half)
            impressions.item_id_UJ[user, j] = draw_item(catalog, category, uniform(key, j, _ITEM))
            impressions.category_id_UJ[user, j] = category
            impressions.timestamp_UJ[user, j] = earliest + int(uniform(key, j, _SECOND) * (latest - earliest))
            impressions.label_UJ[user, j] = uniform(key, j, _CLICK) < chance
            impressions.click_probability_UJ[user, j] = chance
            impressions.scene_UJ[user, j] = pick(law.scene_chance, uniform(key, j, _SCENE))


@numba.njit(inline="always")
def _weights(decay: F64, categories: I64, before: int, category: int) -> tuple[float, float]:
    """Sum up the weights of all behaviours before ``before``, and of those of ``category`` among them."""
    total = relevant = 0.0
    weight = 1.0
    for past in range(before - 1, -1, -1):
        total += weight
        if categories[past] == category:
            relevant += weight
        weight *= decay[past]
        if weight < 1e-15:
            break  # What is left does not change the sums.
    return total, relevant


class BayesAuc:
    """Expected AUC of scoring each impression by its true chance, over any number of impressions.

    No model has a higher one but by luck. Chances that agree in three digits count as ties.
    """

    _BINS = 4096

    def __init__(self) -> None:
        self._positives = np.zeros(self._BINS)
        self._negatives = np.zeros(self._BINS)

    def add(self, probability: F64) -> None:
        """Count impressions with these chances, of any shape."""
        probability = probability.ravel()
        bin_index = np.minimum((probability * self._BINS).astype(np.int64), self._BINS - 1)
        self._positives += np.bincount(bin_index, probability, self._BINS)
        self._negatives += np.bincount(bin_index, 1 - probability, self._BINS)

    def value(self) -> float:
        """The AUC, 0.5 .. 1; 0.5 where all labels are the same for certain."""
        # Every impression counts as a positive by its chance and as a negative by the rest.
        pairs = self._positives.sum() * self._negatives.sum()
        below = np.cumsum(self._negatives) - self._negatives
        won = (self._positives * (below + self._negatives / 2)).sum()
        return float(won / pairs) if pairs else 0.5
