"""DARE: attention and representation have tables of their own (arXiv 2410.02604)."""

from embeddings.model import CtrModel, TableRoles


class Dare(CtrModel):
    """Decoupled attention and representation embeddings."""

    roles = TableRoles(
        target_attention="attention",
        history_attention="attention",
        target_representation="representation",
        history_representation="representation",
    )
