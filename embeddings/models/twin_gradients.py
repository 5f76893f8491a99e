"""TWIN whose tables see the gradients of attention and representation apart (DARE, figures 2 and 3, appendix C)."""

from embeddings.gradients_apart import Combine, added, normalized, tables_apart
from embeddings.lookup import BatchRows
from embeddings.models.twin import Twin


class TwinDuplicated(Twin):
    """TWIN with its tables read twice, once for each concern, and the sum of both gradients: it trains as TWIN does.

    `combine` may be replaced by a function that looks at both gradients before it adds them.
    """

    combine: Combine = staticmethod(added)

    def apart(self, rows: BatchRows) -> tuple[BatchRows, BatchRows]:
        """Two readings of the same rows."""
        return tables_apart(rows, self.combine)


class TwinGradientNormalization(TwinDuplicated):
    """Attention's gradient of each shared table is scaled to the norm of representation's before they are added."""

    combine: Combine = staticmethod(normalized)
