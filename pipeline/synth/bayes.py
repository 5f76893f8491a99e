"""The AUC that the true chances of a click have, over any number of impressions."""

import numpy as np

from pipeline.synth.catalog import F64


class BayesAuc:
    """Expected AUC of scoring each impression by its true chance; chances that agree in three digits count as ties."""

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
        pairs = self._positives.sum() * self._negatives.sum()
        below = np.cumsum(self._negatives) - self._negatives
        won = (self._positives * (below + self._negatives / 2)).sum()
        return float(won / pairs) if pairs else 0.5
