"""DIN: attention by a perceptron, without positions (arXiv 1706.06978), with a search before it; and its short form."""

from typing import ClassVar

from torch import nn

from embeddings.batch import Batch, Selection
from embeddings.layers.scoring import DinScore
from embeddings.model import SearchPlace
from embeddings.models.twin import Twin
from embeddings.search.by_category import latest
from embeddings.tables.collections import AllCrossRows


class Din(Twin):
    """Attention by a perceptron over target and behaviour; search by the same score."""

    searched: ClassVar[SearchPlace] = "local"
    without = frozenset({"position"})

    def make_scoring(self) -> nn.Module:
        """A perceptron."""
        return DinScore(sum(self.represented_dims().values()))


class DinShort(Din):
    """DIN over the K latest behaviours, without a search: the floor."""

    searched = "ids"

    def search_locally(self, batch: Batch, cross: AllCrossRows) -> dict[str, Selection]:
        """The latest; no rows are looked up."""
        return latest(batch, self.settings.retrieved)
