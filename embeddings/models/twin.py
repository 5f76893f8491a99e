"""TWIN, whose attention and representation share their embedding tables (arXiv 2302.02352), and its variants.

M = behaviours of all users, d = dim of an item row.
"""

import math

from torch import Tensor

from embeddings.batch import Batch, History, Selection
from embeddings.gradient_routing import Combine, added, normalized, split_gradients
from embeddings.layers.scoring import ScaledDotProduct
from embeddings.model import CtrModel
from embeddings.search.by_category import search_by_category
from embeddings.search.clusters import log_counts
from embeddings.search.local import search_by_dot_product
from embeddings.tables.batch_rows import BatchRows
from embeddings.tables.collections import SmallRows
from embeddings.tables.specs import TableRoles


class Twin(CtrModel):
    """TWIN: one set of tables for attention and representation; search and attention rank by the same score.

    This is the TWIN that the DARE paper compares with: DARE with shared tables, and nothing else changed. The TWIN
    paper scores with learned projections and several heads, and scores cross features by one number each, which it
    makes of projected rows; here the score is the scaled dot product of the rows themselves, each cross feature a part.
    """

    roles = TableRoles(
        target_attention="shared",
        history_attention="shared",
        target_representation="shared",
        history_representation="shared",
    )


class TwinFourTables(Twin):
    """TWIN with four sets of tables: for attention and for representation, of targets and of behaviours (TWIN-4E)."""

    roles = TableRoles(
        target_attention="target_attention",
        history_attention="history_attention",
        target_representation="target_representation",
        history_representation="history_representation",
    )


class TwinWithoutProduct(Twin):
    """TWIN without the product of pooled history and target in the prediction (w/o TR)."""

    target_aware = False


class TwinHard(Twin):
    """TWIN whose search takes the latest behaviours of the target's category, then the latest of the others."""

    searched = "ids"
    needs_categories = True

    def search_locally(self, batch: Batch, small: SmallRows) -> dict[str, Selection]:
        """Select by category; no rows are looked up."""
        return search_by_category(batch, self.settings.retrieved, self.sizes.lengths, filled=True)


class TwinV2(Twin):
    """TWIN-V2: a target attends to clusters of behaviours, whose scores grow by the logarithm of their size.

    A cluster has at most ``cluster_size`` behaviours; the one nearest to its middle, by item rows, stands for it, as
    categorical features do in section 4.2 (arXiv 2407.16357). The paper clusters offline, from time to time, after
    grouping behaviours by how much of a video was watched; here each window is clustered in each step, by the rows of
    that step, without groups.
    """

    scoring: ScaledDotProduct
    searched = "local"

    def search_products(self, dim: int) -> int:
        """Multiplications of the score, and of four passes over the item rows for each split of the longest window."""
        item = self.tables.inherent_dims(self.roles.history_attention)["item"]
        # Each split halves the clusters, so a window of N needs log2(N / cluster_size) rounds; a round takes the mean,
        # two distances and the products along the line.
        splits = math.ceil(math.log2(max(1, max(self.sizes.lengths.values()) / self.settings.cluster_size)))
        return dim + 4 * item * splits

    def search_locally(self, batch: Batch, small: SmallRows) -> dict[str, Selection]:
        """Select the K clusters of the highest score, each by the behaviour that stands for it."""
        rows = self._local_rows(batch, small)

        def cluster_weights(rows_Md: Tensor, history: History) -> Tensor:
            return log_counts(rows_Md, history, self.settings.cluster_size)

        return search_by_dot_product(rows, self.scoring, self.settings.retrieved, cluster_weights)


class TwinDuplicated(Twin):
    """TWIN that reads its tables once for each role, attention and representation, and adds both gradients.

    It trains as TWIN does, while the two gradients can be seen apart (DARE, figures 2 and 3): ``combine`` may be
    replaced by a function that looks at both before it adds them.
    """

    combine: Combine = staticmethod(added)

    def split_gradients(self, rows: BatchRows) -> tuple[BatchRows, BatchRows]:
        """Read the same rows twice: for attention, and for representation."""
        return split_gradients(rows, self.combine)


class TwinGradientNormalization(TwinDuplicated):
    """TWIN whose two gradients of each shared table are brought to one norm before they are added (DARE, appendix C).

    Attention's gradient is scaled to the norm of representation's. The norms are those of the whole table's gradients
    over the global batch.
    """

    combine: Combine = staticmethod(normalized)
