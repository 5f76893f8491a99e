"""Delta checkpoints: a full one, and the rows of the tables that have changed since.

A delta has all that decides how training goes on but the tables, as a full checkpoint has it, and of the tables and
their optimizers' state those rows that may have changed since the full one that it stands on. So each delta needs that
full one and no other delta.

N = rows of a table that have changed.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._traverse import set_element

from embeddings.distributed.changed_rows import ChangedRows
from pipeline.runs.checkpoint import Base, Checkpoint, from_first_rank, on_every_rank
from pipeline.runs.rows_file import RowsFile, TableRows
from schemas.documents import inside
from schemas.errors import UserError

_TABLE = re.compile(r"\.embedding_bags\.([^.]+)\.weight(?:\.|$)")
_ROWS_FILE = re.compile(r"rows-[0-9]+\.safetensors")


def rows_file_name(rank: int) -> str:
    """Return the name of the file in which a rank writes its changed rows."""
    return f"rows-{rank}.safetensors"


def table_of(key: str) -> str | None:
    """Return the name of the table whose rows a value of a checkpoint has, those of its optimizer's state included."""
    match = _TABLE.search(key)
    return match[1] if match else None


class DeltaState:
    """What the next delta of a run stands on, and which rows have changed since.

    Args:
        model: sharded, as it is at the checkpoint ``resumed``; all that changes in its tables from here on is watched.
        resumed: the checkpoint that the run goes on from; None: it begins.

    Raises:
        UserError: on all ranks, for a sharding that does not leave each row on one rank, or a delta that is damaged.
    """

    def __init__(self, model: nn.Module, resumed: Checkpoint | None) -> None:
        self._changed = ChangedRows(model)
        self.base: Base | None = None
        """The full checkpoint that the next delta stands on; None: the next checkpoint is a full one."""
        if resumed is not None:
            self.base = resumed.base or from_first_rank(lambda: Base.of(resumed))
            if resumed.base is not None:
                self._restore(model, resumed)

    def _restore(self, model: nn.Module, delta: Checkpoint) -> None:
        """Mark the rows that a delta has."""
        tables = {key: value for key, value in _flat({"model": model.state_dict()}).items() if table_of(key)}

        def mark() -> None:
            for key, part in _parts(tables, delta):
                for row_N, _ in part.rows([]):
                    self._changed.mark(str(table_of(key)), row_N - part.first_row)

        on_every_rank(mark)

    def begin(self) -> None:
        """From here on changes are counted: the state that a full checkpoint saves has just been copied."""
        self._changed.clear()

    def split(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], list[TableRows]]:
        """Take a state apart: all but the tables, as it is, and copies of the rows of them that may have changed."""
        rest = part_of_state(state, lambda key: table_of(key) is None)
        shards: dict[str, dict[str, tuple[int, Tensor]]] = {}
        for key, value in _flat(state).items():
            assert isinstance(value, ShardedTensor) == (table_of(key) is not None), key
            if isinstance(value, ShardedTensor):
                for shard in value.local_shards():
                    of_table = shards.setdefault(str(table_of(key)), {})
                    # `ChangedRows` has refused tables that are cut otherwise.
                    assert key not in of_table, key
                    of_table[key] = shard.metadata.shard_offsets[0], shard.tensor.detach()
        return rest, [self._rows_of(table, of_table) for table, of_table in shards.items()]

    def _rows_of(self, table: str, shards: Mapping[str, tuple[int, Tensor]]) -> TableRows:
        local_N = self._changed.rows(table)
        ((first, rows),) = {(first, len(tensor)) for first, tensor in shards.values()}
        values = {key: tensor.index_select(0, local_N.to(tensor.device)).cpu() for key, (_, tensor) in shards.items()}
        row_N = (local_N + first).cpu()
        dtype = torch.int32 if first + rows <= torch.iinfo(torch.int32).max else torch.int64
        return TableRows(table, first, first + rows, row_N.to(dtype), values)


def put_rows(state: Mapping[str, Any], delta: Checkpoint) -> None:
    """Put the rows that a delta has into tables, in place, over those of its full checkpoint; all ranks must call it.

    Args:
        state: nested dictionaries of tensors, sharded by rows or not at all, all of them of tables.
        delta: the checkpoint.

    Raises:
        UserError: on all ranks, where a file of one of them is missing or damaged, or has rows of another table.
    """
    tables = _flat(state)

    def put() -> None:
        for key, part in _parts(tables, delta):
            for row_N, (values,) in part.rows([key]):
                part.put(row_N, values)

    on_every_rank(put)


@dataclass(frozen=True)
class _Part:
    """The part of a tensor that is here, and a file with some rows of it."""

    file: RowsFile
    key: str
    tensor: Tensor
    """(rows here,) or (rows here, columns here)."""
    first_row: int
    columns: slice
    shape: tuple[int, ...]
    """That of the whole."""

    def rows(self, keys: list[str]) -> Any:
        table = str(table_of(self.key))
        return self.file.chunks(table, keys, self.first_row, self.first_row + len(self.tensor))

    def put(self, row_N: Tensor, values: Tensor) -> None:
        """Put values, (N,) or (N, columns), into rows that are counted in the whole."""
        if (values.dtype, values.shape[1:]) != (self.tensor.dtype, self.shape[1:]):
            theirs = f"{values.dtype} x {tuple(values.shape[1:])}"
            raise UserError(
                f"{self.file} has rows of {self.key} that are {theirs}, not {self.tensor.dtype} x {self.shape[1:]}"
            )
        here = values if values.dim() == 1 else values[:, self.columns]
        device = self.tensor.device
        self.tensor.index_copy_(0, (row_N - self.first_row).to(device), here.to(device))


def _parts(tables: Mapping[str, Any], delta: Checkpoint) -> list[tuple[str, _Part]]:
    """Parts of tensors that are here, by key, with each file of a delta that may have rows of them."""
    files = _rows_files(delta)
    parts = list[tuple[str, _Part]]()
    for key, value in tables.items():
        table = str(table_of(key))
        shape = tuple(value.size())
        _check_covered(delta, files, table, shape[0])
        for first, columns, tensor in _local(value):
            for file in files:
                begin, end = file.ranges.get(table, (0, 0))
                if begin < first + len(tensor) and first < end:
                    parts.append((key, _Part(file, key, tensor, first, columns, shape)))
    return parts


def rows_files(delta: Checkpoint, table: str, rows: int) -> list[RowsFile]:
    """Return the files of a delta that have the changed rows of a table; ``rows``: how many rows the table has.

    Raises:
        UserError: one is missing or damaged.
    """
    files = _rows_files(delta)
    _check_covered(delta, files, table, rows)
    return [file for file in files if table in file.ranges]


def _rows_files(delta: Checkpoint) -> list[RowsFile]:
    names = sorted(file.path for file in delta.files or () if _ROWS_FILE.fullmatch(file.path))
    return [RowsFile(inside(delta.path, name)) for name in names]


def _check_covered(delta: Checkpoint, files: list[RowsFile], table: str, rows: int) -> None:
    """Refuse a delta without the file of one of the ranks that had a part of a table."""
    known = 0
    for begin, end in sorted(file.ranges[table] for file in files if table in file.ranges):
        if begin != known:
            break
        known = end
    if known != rows:
        raise UserError(f"{delta.path}: no file has the changes of table {table} from row {known} on, of {rows}")


def _local(value: Any) -> list[tuple[int, slice, Tensor]]:
    """The first row, the columns and the tensor of each part of a value that is here."""
    if not isinstance(value, ShardedTensor):
        return [(0, slice(None), value)]
    found = []
    for shard in value.local_shards():
        first, *column = shard.metadata.shard_offsets
        columns = slice(column[0], column[0] + shard.tensor.shape[1]) if column else slice(None)
        found.append((first, columns, shard.tensor))
    return found


def part_of_state(state: Mapping[str, Any], wanted: Callable[[str], bool]) -> dict[str, Any]:
    """Return those values of nested dictionaries whose flattened keys are wanted, nested as they were."""
    values, paths = flatten_state_dict(dict(state))
    # All ranks must have the same keys at the top.
    part: dict[str, Any] = {key: {} for key, value in state.items() if isinstance(value, dict)}
    for key, value in values.items():
        if wanted(key):
            set_element(part, paths[key], value)
    return part


def _flat(state: Mapping[str, Any]) -> dict[str, Any]:
    return flatten_state_dict(dict(state))[0]
