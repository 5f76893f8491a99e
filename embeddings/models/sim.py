"""SIM: general search, then exact attention with several heads (arXiv 2006.05639).

The paper's attention sees the time between behaviour and target; here it sees the features of the settings.
T = targets, N = longest window, H = heads.
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
from embeddings.search.local import search_locally
from embeddings.tables.collections import AllCrossRows


class SimHard(Twin):
    """Hard search: the latest behaviours of the target's category, and only those; attention with two heads, no TR."""

    searched: ClassVar[SearchPlace] = "ids"
    needs_categories = True
    target_aware = False
    heads = 2

    def make_scoring(self) -> nn.Module:
        """Attention's score, of each head."""
        return MultiHeadScore(sum(super().represented_dims().values()), self.heads)

    def search_locally(self, batch: Batch, cross: AllCrossRows) -> dict[str, Selection]:
        """By category; no rows are looked up."""
        return search_by_category(batch, self.settings.retrieved, filled=False)


class SimSoft(SimHard):
    """Soft search by the product of mapped rows, which learns from an auxiliary prediction on the whole history."""

    searched = "local"
    needs_categories = False
    auxiliary_always = True
    auxiliary_heads = 1

    def make_modules(self) -> None:
        """The search's score: the scaled product of mapped rows, as ``(W_b e_i) . (W_a e_a)`` in equation 1."""
        dims = self.represented_dims()
        of_target, of_behavior = (RowsMap(dims, tuple(dims), dims, bias=False) for _ in range(2))
        self.searching = MappedDotProduct(of_target, of_behavior)

    def search_locally(self, batch: Batch, cross: AllCrossRows) -> dict[str, Selection]:
        """The K best by that score, locally: the auxiliary prediction brings all rows there in training."""
        return search_locally(self._local_rows(batch, cross), self.searching, self.settings.retrieved)

    def search_products(self, dim: int) -> int:
        """Products of a pair, counted on the mapped rows."""
        return dim

    def auxiliary_attention(self, target: Rows, behaviors: Rows, chosen: Selection) -> Tensor:
        """That score itself, not its softmax, (T, N) (section 3.1)."""
        score_TN: Tensor = self.searching(target, behaviors)
        return score_TN * chosen.valid_TK
