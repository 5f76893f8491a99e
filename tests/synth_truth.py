"""What is true of generated data, slowly and plainly: categories of items, relevance of past behaviours, chances.

T = targets of one user, N = behaviours of that user, in time order.
"""

import numpy as np

from pipeline.synth.catalog import F64, I64, build_catalog
from schemas.synth import DAY, SynthSettings


class GroundTruth:
    """Answers for data that ``settings`` generated. Ids are raw ids, timestamps are seconds.

    A past behaviour's weight is exp(-age / decay_days); its relevance to a target is its share of the weights of all
    behaviours strictly earlier than the target, if it is of the target's category, else 0.
    """

    def __init__(self, settings: SynthSettings):
        self.settings = settings
        self.catalog = build_catalog(settings)

    def category_of_item(self, item_id: I64) -> I64:
        """Category of raw item ids; any shape."""
        category_of_id = np.zeros(self.settings.items + 1, np.int64)
        counts = np.diff(self.catalog.first_item_C1)
        category_of_id[self.catalog.item_id_I] = np.repeat(np.arange(1, self.settings.categories + 1), counts)
        assert category_of_id[1:].all(), "every id from 1 on is an item's"
        return category_of_id[item_id]

    def relevance(self, category_N: I64, timestamp_N: I64, target_category_T: I64, target_timestamp_T: I64) -> F64:
        """Relevance of each behaviour to each target, (T, N): at least 0, at most 1 in sum over N."""
        age_TN = (np.asarray(target_timestamp_T)[:, None] - np.asarray(timestamp_N)).astype(np.float64)
        age_TN[age_TN <= 0] = np.inf
        # Ages counted from the latest past behaviour: the shares are the same, and no sum vanishes.
        latest_T1 = age_TN.min(axis=1, keepdims=True, initial=np.inf)
        age_TN -= np.where(np.isfinite(latest_T1), latest_T1, 0)
        weight_TN = np.exp(-age_TN / (self.settings.decay_days * DAY))
        share_TN = weight_TN / np.maximum(weight_TN.sum(axis=1, keepdims=True), 1)
        return share_TN * (np.asarray(category_N) == np.asarray(target_category_T)[:, None])

    def click_probability(
        self, category_N: I64, timestamp_N: I64, target_category_T: I64, target_timestamp_T: I64
    ) -> F64:
        """Chance that the user clicks each target when it is shown, (T,)."""
        settings = self.settings
        relevance_T = self.relevance(category_N, timestamp_N, target_category_T, target_timestamp_T).sum(axis=1)
        span = settings.click_ceiling - settings.click_floor
        return settings.click_floor + span * relevance_T / (relevance_T + settings.click_half)

    def category_probability(
        self, category_N: I64, timestamp_N: I64, target_category_T: I64, target_timestamp_T: I64
    ) -> F64:
        """Chance that a behaviour at the target's time is of the target's category, (T,).

        Divided by ``category_popularity`` it is the best score there is for telling the user's next item from
        negatives drawn by frequency.
        """
        popularity_T = self.category_popularity(target_category_T)
        relevance_T = self.relevance(category_N, timestamp_N, target_category_T, target_timestamp_T).sum(axis=1)
        has_past_T = np.asarray(target_timestamp_T) > np.min(timestamp_N, initial=np.iinfo(np.int64).max)
        loyalty_T = np.where(has_past_T, self.settings.loyalty, 0)
        return loyalty_T * relevance_T + (1 - loyalty_T) * popularity_T

    def category_popularity(self, category: I64) -> F64:
        """Chance of each category among all behaviours; any shape.

        Raises:
            ValueError: an id that is no category's.
        """
        category = np.asarray(category)
        if category.size and (category.min() < 1 or category.max() > self.settings.categories):
            raise ValueError(f"categories are 1 to {self.settings.categories}; {category.max()} is given")
        return self.catalog.popularity_C[category - 1]
