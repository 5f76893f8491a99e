"""DIN: attention by an MLP of target and behaviour (arXiv 1706.06978), and its short form."""

from typing import ClassVar

from torch import nn

from embeddings.batch import Batch, Selection
from embeddings.layers.scoring import DinScore
from embeddings.model import SearchPlace
from embeddings.models.twin import Twin
from embeddings.search.by_category import latest
from embeddings.tables.collections import SmallRows


class Din(Twin):
    """Deep Interest Network: an MLP of target and behaviour is the attention's score, and the search ranks by it.

    The paper has no search and no softmax: it pools the whole history with the scores as weights. Here, as in the
    comparisons of the DARE paper, the model attends to the K best by its own score, with the softmax of all models.
    The MLP's input is divided by its dim, and there is no position table, whatever features the settings name.
    """

    searched: ClassVar[SearchPlace] = "local"
    without = frozenset({"position"})

    def make_scoring(self) -> nn.Module:
        """Make the MLP that scores a pair."""
        return DinScore(sum(self.attended_dims().values()))


class DinShort(Din):
    """DIN over the K latest behaviours, without a search: what a model of a short history reaches.

    It is of no paper; it is the floor that a search has to rise above.
    """

    searched = "ids"

    def search_locally(self, batch: Batch, small: SmallRows) -> dict[str, Selection]:
        """Select the K latest behaviours; no rows are looked up."""
        return latest(batch, self.settings.retrieved)
