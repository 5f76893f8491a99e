"""TWIN: one set of tables for attention and representation (arXiv 2302.02352), otherwise as DARE."""

from embeddings.model import CtrModel, TableRoles


class Twin(CtrModel):
    """Attention and representation share their embeddings."""

    roles = TableRoles(
        target_attention="shared",
        history_attention="shared",
        target_representation="shared",
        history_representation="shared",
    )
