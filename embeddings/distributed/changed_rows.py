"""Which rows of the tables may have changed since a moment: those that have been looked up with gradient since.

I = ids of a lookup, R = local rows of all tables of a kernel, one table's after the other's.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import ShardingType

from embeddings.distributed.row_wise import ROW_MARKS
from schemas.errors import UserError

_KEPT_WHOLE = (ShardingType.ROW_WISE.value, ShardingType.TABLE_WISE.value)
"""Ways of sharding that leave each row on one rank."""


class RowMarks:
    """A mark for each local row of the tables of one FBGEMM kernel; nothing here waits for a GPU.

    Args:
        rows: local rows of each table.
        device: where ids come from.
    """

    def __init__(self, rows: list[int], device: torch.device) -> None:
        self._rows = rows
        self._firsts = [sum(rows[:number]) for number in range(len(rows))]
        self._marked_R = torch.zeros(sum(rows), dtype=torch.bool, device=device)
        # Made once: an upload within a step would wait for the GPU.
        self._first_T = torch.tensor(self._firsts, dtype=torch.int64, device=device)

    def of(self, number: int) -> Tensor:
        """The marks of a table, bool (local rows,): what is written here is marked."""
        return self._marked_R[self._firsts[number] :][: self._rows[number]]

    def after_lookup(self, module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any], _: Any) -> None:
        """Mark what FBGEMM's module has looked up: a hook of its forward pass."""
        if not torch.is_grad_enabled():
            return
        indices_I, offsets = (*arguments, *(named[name] for name in ("indices", "offsets") if name in named))[:2]
        if not len(indices_I):
            return
        index_I, tables = indices_I.long(), len(self._rows)
        if tables > 1:
            # Each table has as many bags; where its last one ends, the next table's ids begin.
            bags = (len(offsets) - 1) // tables
            end_T = offsets[bags::bags].long().contiguous()
            place_I = torch.arange(len(index_I), device=index_I.device)
            index_I = index_I + self._first_T[torch.searchsorted(end_T, place_I, right=True)]
        self._marked_R.index_fill_(0, index_I, True)

    def clear(self) -> None:
        """Take all marks away."""
        self._marked_R.zero_()


class ChangedRows:
    """Watches from here on which rows of a sharded model's tables may change.

    A table's optimizer is part of the backward pass of a lookup: it moves the rows that were looked up, and their
    state, and no others, whichever of `embeddings.sharding.OPTIMIZERS` it is; none of them decays weights. So what was
    never looked up with gradient is, bit for bit, what it was. A row that was looked up and did not change is marked
    all the same, and of small tables, which a step gathers as a whole, all rows are.

    Args:
        model: sharded.

    Raises:
        UserError: on all ranks, if a sharding plan cuts the rows of a table into columns.
    """

    def __init__(self, model: nn.Module) -> None:
        self._kernels = list[RowMarks]()
        self._tables = dict[str, Tensor]()
        for collection in model.modules():
            if not isinstance(collection, ShardedEmbeddingBagCollection):
                continue
            for name, sharding in collection.module_sharding_plan.items():
                if sharding.sharding_type not in _KEPT_WHOLE:
                    raise UserError(
                        f"checkpoint.delta_every: the sharding plan has table {name} "
                        f"{sharding.sharding_type}; "
                        f"changed rows are known of tables that are {' or '.join(_KEPT_WHOLE)}: make the plan anew, or "
                        "leave checkpoint.delta_every out"
                    )
            for kernel in (kernel for lookup in collection._lookups for kernel in lookup._emb_modules):
                tables = kernel.config.embedding_tables
                # One feature a table (`embeddings.tables.collections`), so that FBGEMM's n-th feature is table n.
                assert all(len(table.feature_names) == 1 for table in tables), tables
                marks = RowMarks([table.local_rows for table in tables], kernel.emb_module.current_device)
                setattr(kernel.emb_module, ROW_MARKS, marks)
                # After the lookup, which refuses ids outside of its table.
                kernel.emb_module.register_forward_hook(marks.after_lookup, with_kwargs=True)
                self._kernels.append(marks)
                self._tables |= {table.name: marks.of(number) for number, table in enumerate(tables)}

    def rows(self, table: str) -> Tensor:
        """The local rows of a table that may have changed, int64 in order, on its device; a GPU is waited for."""
        return self._tables[table].nonzero().flatten()

    def mark(self, table: str, row_I: Tensor) -> None:
        """Mark local rows (int64) of a table."""
        marked_R = self._tables[table]
        marked_R.index_fill_(0, row_I.to(marked_R.device), True)

    def __contains__(self, table: str) -> bool:
        return table in self._tables

    def clear(self) -> None:
        """Take all marks away: what changes from here on is what will be marked."""
        for marks in self._kernels:
            marks.clear()
