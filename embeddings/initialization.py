"""First values of a model's parameters: the same for the same seed, however its tables are sharded.

Each value is drawn from a generator whose seed is a hash of the run's seed and the parameter's name, so that neither
the number of ranks nor another parameter changes it.

R = rows of a shard, d = its dim.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.model_parallel import get_unwrapped_module

from embeddings.tables.collections import INITIAL_DEVIATION

BLOCK_ROWS = 8192
"""Tables are filled in blocks of so many rows, each from a generator of its own, so that a rank draws its own alone."""


@torch.no_grad()
def initialize(model: nn.Module, seed: int, day: int = 0) -> None:
    """Draw all weights: tables and linear layers from N(0, 0.01^2), biases of linear layers as PyTorch does.

    PReLU and batch normalisation keep the values that they are built with.

    Args:
        model: a `CtrModel`, or the `DistributedModelParallel` around one; every rank fills the rows that it has.
        seed: decides all values.
        day: number of the day in its chain on which tables have grown; each day draws other rows, so that a new row
            does not begin with what an older one, which lay there before, has begun with.
    """
    # Without the wrappers the names are those of the plain model, and so are the seeds that are made of them.
    inner = get_unwrapped_module(model)
    for name, module in inner.named_modules():
        if isinstance(module, nn.Linear):
            # Drawn on the CPU and copied, so that a GPU starts from the same values.
            module.weight.copy_(torch.randn(module.weight.shape, generator=_generator(seed, name)) * INITIAL_DEVIATION)
            if module.bias is not None:
                # The range of `torch.nn.Linear.reset_parameters`.
                bound = module.in_features**-0.5
                drawn = torch.rand(module.bias.shape, generator=_generator(seed, name, "bias"))
                module.bias.copy_((2 * drawn - 1) * bound)
    for shard in table_shards(model):
        _fill(shard, seed, day)


class TableShard(NamedTuple):
    """The part of a table that this rank has."""

    key: str
    """The table's name in the model's state."""
    rows_Rd: Tensor
    """The values themselves: what is written here is in the table."""
    first_row: int
    first_column: int
    table_rows: int
    """Rows of the whole table."""
    dim: int
    """Dim of the whole table."""

    @property
    def last_row(self) -> int:
        """The row after the last one."""
        return self.first_row + len(self.rows_Rd)

    @property
    def columns(self) -> slice:
        """Which of the table's columns are here."""
        return slice(self.first_column, self.first_column + self.rows_Rd.shape[1])


def table_shards(model: nn.Module) -> Iterator[TableShard]:
    """The parts of tables that this rank has of a model, which may be sharded or not."""
    # The state, not the parameters: there a table has the same name whether it is sharded or not, and a sharded one
    # says which of its rows are here.
    for key, value in get_unwrapped_module(model).state_dict().items():
        if ".embedding_bags." not in key:
            continue
        if not isinstance(value, ShardedTensor):
            yield TableShard(key, value, 0, 0, len(value), value.shape[1])
            continue
        rows, dim = value.size()
        for shard in value.local_shards():
            first_row, first_column = shard.metadata.shard_offsets
            yield TableShard(key, shard.tensor, first_row, first_column, rows, dim)


def _fill(shard: TableShard, seed: int, day: int) -> None:
    # Blocks that this shard has a part of. One of them may begin before it and is drawn whole all the same, because a
    # generator cannot start in the middle.
    first_row, last_row = shard.first_row, shard.last_row
    for block in range(first_row // BLOCK_ROWS, -(-last_row // BLOCK_ROWS)):
        start, end = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, shard.table_rows)
        # Day 0 has the keys of data without days.
        generator = _generator(seed, shard.key, block, *(("day", day) if day else ()))
        drawn = torch.randn(end - start, shard.dim, generator=generator) * INITIAL_DEVIATION
        low, high = max(start, first_row), min(end, last_row)
        shard.rows_Rd[low - first_row : high - first_row].copy_(drawn[low - start : high - start, shard.columns])


def _generator(*key: object) -> Generator:
    # Python's own `hash` of strings differs from process to process.
    digest = hashlib.sha256(repr(key).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
