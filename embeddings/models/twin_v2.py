"""TWIN-V2: a history is clustered, and a target attends to clusters (arXiv 2407.16357)."""

import math

from torch import Tensor

from embeddings.batch import Batch, History
from embeddings.models.twin import Twin
from embeddings.scoring import ScaledDotProduct
from embeddings.search.clusters import log_counts
from embeddings.search.home import search_at_home
from embeddings.search.selection import Selection
from embeddings.tables import AllCrossRows


class TwinV2(Twin):
    """TWIN over clusters of at most ``cluster_size`` behaviours; the score of each grows by the log of its size.

    The behaviour nearest to the middle of its cluster, by item rows, stands for it (as categorical features in section
    4.2). The paper clusters offline, from time to time; here it is done in each step, with the rows of that step.
    """

    scoring: ScaledDotProduct
    searched = "at home"

    def search_products(self, dim: int) -> int:
        """Of the score, and of four passes over the item rows for each split of the longest window."""
        item = self.tables.inherent_dims(self.roles.history_attention)["item"]
        splits = math.ceil(math.log2(max(1, max(self.sizes.lengths.values()) / self.settings.cluster_size)))
        return dim + 4 * item * splits

    def search(self, batch: Batch, cross: AllCrossRows) -> dict[str, Selection]:
        """The K clusters of the highest score, each by the behaviour that stands for it."""
        rows = self._all_rows(batch, cross)
        item = self.tables.inherent_dims(self.roles.history_attention)["item"]

        def stands_for(rows_MD: Tensor, history: History) -> Tensor:
            return log_counts(rows_MD[:, :item], history, self.settings.cluster_size)

        return search_at_home(rows, self.scoring, self.settings.retrieved, stands_for)
