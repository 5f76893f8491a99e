"""TWIN: one set of tables for attention and representation (arXiv 2302.02352), otherwise as DARE; and its variants.

TWIN-V2: a history is clustered, and a target attends to clusters (arXiv 2407.16357).

TWIN whose tables see the gradients of attention and representation apart (DARE, figures 2 and 3, appendix C).
"""

import math

from torch import Tensor

from embeddings.batch import Batch, History, Selection
from embeddings.gradient_routing import Combine, added, normalized, split_gradients
from embeddings.layers.scoring import ScaledDotProduct
from embeddings.model import CtrModel
from embeddings.search.by_category import search_by_category
from embeddings.search.clusters import log_counts
from embeddings.search.local import search_locally
from embeddings.tables.batch_rows import BatchRows
from embeddings.tables.collections import AllCrossRows
from embeddings.tables.specs import TableRoles


class Twin(CtrModel):
    """One set of tables for attention and representation."""

    roles = TableRoles(
        target_attention="shared",
        history_attention="shared",
        target_representation="shared",
        history_representation="shared",
    )


class TwinFourTables(Twin):
    """Four sets of tables: attention and representation, each apart for targets and behaviours (TWIN-4E)."""

    roles = TableRoles(
        target_attention="target_attention",
        history_attention="history_attention",
        target_representation="target_representation",
        history_representation="history_representation",
    )


class TwinWithoutProduct(Twin):
    """TWIN without the target-aware product (w/o TR)."""

    target_aware = False


class TwinHard(Twin):
    """TWIN whose search keeps the latest of the target's category, then the latest others."""

    searched = "ids"
    needs_categories = True

    def search_locally(self, batch: Batch, cross: AllCrossRows) -> dict[str, Selection]:
        """By category; no rows are looked up."""
        return search_by_category(batch, self.settings.retrieved, filled=True)


class TwinV2(Twin):
    """TWIN over clusters of at most ``cluster_size`` behaviours; the score of each grows by the log of its size.

    The behaviour nearest to the middle of its cluster, by item rows, stands for it (as categorical features in section
    4.2). The paper clusters offline, from time to time; here it is done in each step, with the rows of that step.
    """

    scoring: ScaledDotProduct
    searched = "local"

    def search_products(self, dim: int) -> int:
        """Count the score, and four passes over the item rows for each split of the longest window."""
        item = self.tables.inherent_dims(self.roles.history_attention)["item"]
        splits = math.ceil(math.log2(max(1, max(self.sizes.lengths.values()) / self.settings.cluster_size)))
        return dim + 4 * item * splits

    def search_locally(self, batch: Batch, cross: AllCrossRows) -> dict[str, Selection]:
        """The K clusters of the highest score, each by the behaviour that stands for it."""
        rows = self._local_rows(batch, cross)
        item = self.tables.inherent_dims(self.roles.history_attention)["item"]

        def cluster_weights(rows_MD: Tensor, history: History) -> Tensor:
            return log_counts(rows_MD[:, :item], history, self.settings.cluster_size)

        return search_locally(rows, self.scoring, self.settings.retrieved, cluster_weights)


class TwinDuplicated(Twin):
    """TWIN with its tables read twice, once for each concern, and the sum of both gradients: it trains as TWIN does.

    `combine` may be replaced by a function that looks at both gradients before it adds them.
    """

    combine: Combine = staticmethod(added)

    def split_gradients(self, rows: BatchRows) -> tuple[BatchRows, BatchRows]:
        """Two readings of the same rows."""
        return split_gradients(rows, self.combine)


class TwinGradientNormalization(TwinDuplicated):
    """Attention's gradient of each shared table is scaled to the norm of representation's before they are added."""

    combine: Combine = staticmethod(normalized)
