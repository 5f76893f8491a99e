"""First values of a model's parameters: the same for the same seed, however its tables are sharded.

Each value is drawn from a generator whose seed is a hash of the run's seed and the parameter's name, so that neither
the number of ranks nor another parameter changes it.

R = rows of a shard, d = its dim.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Generator, Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.model_parallel import get_unwrapped_module

from embeddings.tables.collections import INITIAL_DEVIATION

BLOCK_ROWS = 8192
"""Tables are filled in blocks of so many rows, each from a generator of its own, so that a rank draws its own alone."""


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Draw all weights: tables and linear layers from N(0, 0.01^2), biases of linear layers as PyTorch does.

    PReLU and batch normalisation keep the values that they are built with.

    Args:
        model: a `CtrModel`, or the `DistributedModelParallel` around one; every rank fills the rows that it has.
        seed: decides all values.
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
    # The state, not the parameters: there a table has the same name whether it is sharded or not, and a sharded one
    # says which of its rows are here.
    for name, value in inner.state_dict().items():
        if ".embedding_bags." in name:
            for rows, first_row, table_rows, first_column, dim in _shards(value):
                _fill(rows, seed, name, first_row, table_rows, first_column, dim)


def _shards(value: Tensor | ShardedTensor) -> Iterator[tuple[Tensor, int, int, int, int]]:
    """The local parts of a table: values, first row, rows of the table, first column, dim of the table."""
    if not isinstance(value, ShardedTensor):
        yield value, 0, len(value), 0, value.shape[1]
        return
    rows, dim = value.size()
    for shard in value.local_shards():
        first_row, first_column = shard.metadata.shard_offsets
        yield shard.tensor, first_row, rows, first_column, dim


def _fill(rows_Rd: Tensor, seed: int, name: str, first_row: int, table_rows: int, first_column: int, dim: int) -> None:
    # Blocks that this shard has a part of. One of them may begin before it and is drawn whole all the same, because a
    # generator cannot start in the middle.
    last_row, columns = first_row + len(rows_Rd), slice(first_column, first_column + rows_Rd.shape[1])
    for block in range(first_row // BLOCK_ROWS, -(-last_row // BLOCK_ROWS)):
        start, end = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, table_rows)
        drawn = torch.randn(end - start, dim, generator=_generator(seed, name, block)) * INITIAL_DEVIATION
        low, high = max(start, first_row), min(end, last_row)
        rows_Rd[low - first_row : high - first_row].copy_(drawn[low - start : high - start, columns])


def _generator(*key: object) -> Generator:
    # Python's own `hash` of strings differs from process to process.
    digest = hashlib.sha256(repr(key).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
