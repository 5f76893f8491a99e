"""TWIN: one set of tables for attention and representation (arXiv 2302.02352), otherwise as DARE; and its variants."""

from embeddings.batch import Batch
from embeddings.model import CtrModel, TableRoles
from embeddings.search.by_category import search_by_category
from embeddings.search.selection import Selection
from embeddings.tables import AllCrossRows


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

    searched = "by ids alone"
    needs_categories = True

    def search(self, batch: Batch, cross: AllCrossRows) -> dict[str, Selection]:
        """By category; no rows are looked up."""
        return search_by_category(batch, self.settings.retrieved, filled=True)
