"""ETA: search by SimHash signatures (arXiv 2108.04468)."""

from typing import ClassVar

from embeddings.batch import Batch, Selection
from embeddings.layers.projections import Signature
from embeddings.model import SearchPlace
from embeddings.models.twin import Twin
from embeddings.search.local import search_by_signature
from embeddings.tables.collections import AllCrossRows


class Eta(Twin):
    """Search by the Hamming distance of ``hash_bits`` random projections' signs, attention as TWIN."""

    searched: ClassVar[SearchPlace] = "local"

    def make_modules(self) -> None:
        """The random projections of item and category rows."""
        dims = self.tables.inherent_dims(self.roles.history_attention)
        self.signature = Signature(sum(dims.values()), self.settings.hash_bits)

    def search_products(self, dim: int) -> int:
        """One for each bit."""
        return self.settings.hash_bits

    def search_locally(self, batch: Batch, cross: AllCrossRows) -> dict[str, Selection]:
        """The nearest signatures."""
        return search_by_signature(self._local_rows(batch, cross), self.signature, self.settings.retrieved)
