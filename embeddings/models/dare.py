"""DARE: attention and representation have tables of their own (arXiv 2410.02604), and its variants."""

from embeddings.model import CtrModel
from embeddings.tables.specs import TableRoles


class Dare(CtrModel):
    """Decoupled tables: one set for attention, one for representation."""

    roles = TableRoles(
        target_attention="attention",
        history_attention="attention",
        target_representation="representation",
        history_representation="representation",
    )


class DareWithoutProduct(Dare):
    """DARE without the target-aware product (w/o TR)."""

    target_aware = False


class DareThreeTables(Dare):
    """Attention tables apart for targets and behaviours, one set for representation (appendix C)."""

    roles = TableRoles(
        target_attention="target_attention",
        history_attention="history_attention",
        target_representation="representation",
        history_representation="representation",
    )
