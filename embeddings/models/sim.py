"""SIM: a general search, hard or soft, then exact attention with several heads (arXiv 2006.05639).

T = targets, N = longest window.
"""

from typing import ClassVar

from torch import Tensor, nn

from embeddings.batch import Batch, Selection
from embeddings.features import Rows
from embeddings.layers.projections import RowsMap
from embeddings.layers.scoring import MappedDotProduct, MultiHeadScore
from embeddings.model import SearchPlace
from embeddings.models.twin import Twin
from embeddings.search.by_category import search_by_category
from embeddings.search.local import search_by_dot_product
from embeddings.tables.collections import SmallRows


class SimHard(Twin):
    """SIM (hard): the latest behaviours of the target's category, and only those; attention with two heads.

    The paper's attention sees the time between behaviour and target, concatenated to the behaviour's row. Here it sees
    the features of the settings, of which interval is that time and position its order. As in the paper, the
    prediction has no product of pooled history and target.
    """

    searched: ClassVar[SearchPlace] = "ids"
    needs_categories = True
    target_aware = False
    heads = 2

    def make_scoring(self) -> nn.Module:
        """Make the attention's score, of each head."""
        return MultiHeadScore(sum(self.attended_dims().values()), self.heads)

    def search_locally(self, batch: Batch, small: SmallRows) -> dict[str, Selection]:
        """Select the K latest behaviours of the target's category; no rows are looked up."""
        return search_by_category(batch, self.settings.retrieved, self.sizes.lengths, filled=False)


class SimSoft(SimHard):
    """SIM (soft): search by a product of mapped rows, which learns from an auxiliary prediction on the whole history.

    The paper searches approximately (ALSH), and samples histories that are too long for the auxiliary prediction. Here
    the search is exact, and the auxiliary prediction sees the whole history. Both losses have weight 1, as there.
    """

    searched = "local"
    needs_categories = False
    auxiliary_always = True
    auxiliary_heads = 1

    def make_modules(self) -> None:
        """Make the search's score: the scaled product of mapped rows, ``(W_b e_i) . (W_a e_a)`` in equation 1."""
        name, dims = self.roles.target_attention, self.attended_dims()
        parts = self.tables.inherent_dims(name, scored=True), self.tables.cross_dims(name, scored=True)
        of_target, of_behavior = (RowsMap(*parts, dims, dims, bias=False) for _ in range(2))
        self.searching = MappedDotProduct(of_target, of_behavior)

    def search_locally(self, batch: Batch, small: SmallRows) -> dict[str, Selection]:
        """Select the K best by the search's score, on the sample's rank.

        It could be made on the shards, but in training the auxiliary prediction needs all rows on that rank anyway.
        """
        return search_by_dot_product(self._local_rows(batch, small), self.searching, self.settings.retrieved)

    def search_products(self, dim: int) -> int:
        """The multiplications of one product of mapped rows."""
        return dim

    def auxiliary_attention(self, target: Rows, behaviors: Rows, chosen: Selection) -> Tensor:
        """Weights (T, N) of the auxiliary prediction: the search's score itself, not its softmax (section 3.1)."""
        # Times ``valid``, since without a softmax nothing else takes padding out of the sum.
        score_TN: Tensor = self.searching(target, behaviors)
        return score_TN * chosen.valid_TK
