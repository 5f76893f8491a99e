"""ETA: search by the Hamming distance of SimHash signatures (arXiv 2108.04468)."""

from typing import ClassVar

from embeddings.batch import Batch, Selection
from embeddings.layers.projections import Signature
from embeddings.model import SearchPlace
from embeddings.models.twin import Twin
from embeddings.search.local import search_by_signature
from embeddings.tables.collections import SmallRows


class Eta(Twin):
    """ETA: the K behaviours whose signatures are nearest to the target's; attention as TWIN's.

    A signature is the signs of ``hash_bits`` random projections of the rows of the item and its features. Position and
    the other cross features belong to a pair, not to a behaviour, and are left out of it. The paper keeps signatures in
    a table for serving, and attends with several heads; here signatures are made of the rows of the step, and the
    attention is TWIN's with one head.
    """

    searched: ClassVar[SearchPlace] = "local"

    def make_modules(self) -> None:
        """Make the random projections of the inherent features' rows."""
        dims = self.tables.inherent_dims(self.roles.history_attention, scored=True)
        self.signature = Signature(sum(dims.values()), self.settings.hash_bits)

    def search_products(self, dim: int) -> int:
        """One multiplication for each bit."""
        return self.settings.hash_bits

    def search_locally(self, batch: Batch, small: SmallRows) -> dict[str, Selection]:
        """Select the K behaviours of the nearest signatures, on the sample's rank."""
        return search_by_signature(self._local_rows(batch, small), self.signature, self.settings.retrieved)
