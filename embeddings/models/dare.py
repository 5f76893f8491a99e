"""DARE, whose attention and representation have embedding tables of their own (arXiv 2410.02604), and its variants."""

from embeddings.model import CtrModel
from embeddings.tables.specs import TableRoles


class Dare(CtrModel):
    """DARE: one set of tables for attention, one for representation.

    As in the paper, the search ranks by attention's own score. In the paper and its authors' code a target is scored
    with one history of items, categories and positions; here with any features and any number of sequences.
    """

    roles = TableRoles(
        target_attention="attention",
        history_attention="attention",
        target_representation="representation",
        history_representation="representation",
    )


class DareWithoutProduct(Dare):
    """DARE without the product of pooled history and target in the prediction (w/o TR, section 3.2)."""

    target_aware = False


class DareThreeTables(Dare):
    """DARE with attention tables of their own for targets and for behaviours: three sets in all (appendix C)."""

    roles = TableRoles(
        target_attention="target_attention",
        history_attention="history_attention",
        target_representation="representation",
        history_representation="representation",
    )
