"""Tables that have grown since a checkpoint: its rows go to where they lie now, and new ones stay as they were drawn.

N = items, R = rows of this rank's part of a table, d = dim, C = categories.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard

from pipeline.runs.checkpoint_files import load_values
from pipeline.stream.data_set import DataSet
from schemas.errors import UserError
from schemas.manifest import REMEDY
from schemas.row_layout import RowLayout

CHUNK_ROWS = 1 << 18
"""Rows that are moved at a time."""

I32 = NDArray[np.int32]


@dataclass(frozen=True)
class NewRows:
    """The rows of an item table that were given to an item since a day of the chain."""

    place_N: I32
    """Where they lie, ascending."""
    kept: int
    """How many others items have."""

    @classmethod
    def since(cls, day: int, data_set: DataSet) -> "NewRows":
        """Read off the dictionary of items which rows are new after ``day``, counted from 0.

        Raises:
            UserError: the dictionary cannot be read.
        """
        new, kept = [np.zeros(0, np.int32)], 0
        for place_N, day_N, _ in _held_rows(data_set):
            new.append(place_N[day_N > day])
            kept += len(place_N) - len(new[-1])
        return cls(np.sort(np.concatenate(new)), kept)

    def within(self, first: int, last: int) -> I32:
        """Those from place ``first`` up to ``last``, which is not among them."""
        begin, end = np.searchsorted(self.place_N, [first, last])
        return self.place_N[begin:end]


def _held_rows(data_set: DataSet) -> Iterator[tuple[I32, I32, I32]]:
    """Items that have a row, some at a time: place, the day on which they got it, and id, each (N,)."""
    place_I = data_set.item_places()
    assert place_I is not None
    path = data_set.manifest.verified(data_set.folder, "items.parquet")
    try:
        for batch in pq.ParquetFile(path).iter_batches(CHUNK_ROWS, columns=["id", "row_day"]):
            id_N, day_N = (batch.column(name).to_numpy() for name in ("id", "row_day"))
            place_N = place_I.take(id_N)
            yield place_N[place_N > 0], day_N[place_N > 0], id_N[place_N > 0]
    except (OSError, pa.ArrowException, KeyError, IndexError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); {REMEDY}") from None


def move_rows(
    key: str,
    values: ShardedTensor | None,
    checkpoint: Path,
    shape: tuple[int, ...],
    layouts: tuple[RowLayout, RowLayout],
    new: NewRows | None,
) -> int:
    """Put the rows of a checkpoint where they lie now; all ranks must call it.

    Places ascend within a stripe, whatever its height. So what belongs into a rank's part of the table lies in one
    range of the former one, and the rank reads that range alone: no rank sends rows to another.

    Args:
        key: of the table, or of its optimizer's state, in the checkpoint.
        values: what is filled; rows that are new, or were not there, stay as they are. None: this rank has none.
        checkpoint: its folder.
        shape: the former one.
        layouts: the former and the present one.
        new: rows that have another owner than they had; None: none has.

    Returns:
        Bytes that this rank has read.
    """
    old, now = layouts
    if values is None:
        load_values({}, checkpoint)
        return 0
    parts = _former_parts(values, shape, old, now)
    load_values({key: parts.stored}, checkpoint)
    for shard, (first, former) in zip(values.local_shards(), parts.local, strict=True):
        offset, rows = shard.metadata.shard_offsets, shard.tensor
        columns = [slice(begin, begin + size) for begin, size in zip(offset[1:], rows.shape[1:], strict=True)]
        for begin in range(0, len(rows), CHUNK_ROWS):
            place_R = np.arange(offset[0] + begin, offset[0] + min(begin + CHUNK_ROWS, len(rows)), dtype=np.int32)
            row_R = now.row(place_R)
            # The former table had so many places, filled or not.
            kept_R = row_R < old.places
            if new is not None:
                kept_R[new.within(int(place_R[0]), int(place_R[-1]) + 1) - place_R[0]] = False
            source = torch.from_numpy(old.place(row_R[kept_R]).astype(np.int64) - first)
            target = torch.from_numpy(begin + np.flatnonzero(kept_R)).to(rows.device)
            rows.index_copy_(0, target, former[source][(slice(None), *columns)].to(rows))
    return sum(former.nbytes for _, former in parts.local)


@dataclass(frozen=True)
class _FormerParts:
    stored: Tensor | ShardedTensor
    """What is loaded."""
    local: list[tuple[int, Tensor]]
    """For each part of the table on this rank, former rows that hold all of its own, and which of them is the first."""


def _former_parts(values: ShardedTensor, shape: tuple[int, ...], old: RowLayout, now: RowLayout) -> _FormerParts:
    shards, dtype = values.metadata().shards_metadata, values.dtype
    by_rows = all(list(shard.shard_sizes[1:]) == list(shape[1:]) for shard in shards)
    if not by_rows or old.stripes != now.stripes:
        # A table that has just become large enough to have stripes was a small one. (By columns no planner cuts.)
        whole = torch.empty(shape, dtype=dtype)
        return _FormerParts(whole, [(0, whole) for _ in values.local_shards()])

    def before(place: int) -> int:
        """How many places of the former table come before a place of the present one."""
        stripe, within = divmod(place, now.height)
        return stripe * old.height + min(within, old.height)

    def former_range(shard: ShardMetadata) -> tuple[int, int]:
        first, rows = shard.shard_offsets[0], shard.shard_sizes[0]
        return before(first), before(first + rows)

    # Their sizes on all ranks are known: nobody asks.
    known = [_shard_metadata(*former_range(shard), shape, str(shard.placement)) for shard in shards]
    local, loaded = [], []
    for shard in values.local_shards():
        begin, end = former_range(shard.metadata)
        former = torch.empty((end - begin, *shape[1:]), dtype=dtype)
        local.append((begin, former))
        if end > begin:
            loaded.append(Shard(former, _shard_metadata(begin, end, shape, str(shard.metadata.placement))))
    metadata = ShardedTensorMetadata(
        [each for each in known if each.shard_sizes[0]], torch.Size(shape), TensorProperties(dtype=dtype)
    )
    stored = ShardedTensor._init_from_local_shards_and_global_metadata(loaded, metadata)
    return _FormerParts(stored, local)


def _shard_metadata(begin: int, end: int, shape: tuple[int, ...], placement: str) -> ShardMetadata:
    offsets, sizes = [begin, *([0] * (len(shape) - 1))], [end - begin, *shape[1:]]
    # Read into the host's memory, whatever device the table is on.
    return ShardMetadata(offsets, sizes, f"{placement.split('/')[0]}/cpu")


@torch.no_grad()
def fill_with_means(tables: Mapping[str, ShardedTensor], day: int, data_set: DataSet) -> None:
    """Give new rows of item tables the mean of the rows that items of the same category had; all ranks must call it.

    Items of no known category, and of one that no former item has, keep the rows that they have.

    Args:
        tables: by name.
        day: rows are new that were given after it.
        data_set: says which items are of which category.

    Raises:
        UserError: items have no category of one value.
    """
    record = data_set.feature("category")
    if record.of != "item" or record.kind == "ids" or record.is_number:
        raise UserError(
            f"new_rows=category_mean: category of {data_set.folder} is not one value of each item; set new_rows=initial"
        )
    category_I = data_set.item_features({"category"}).columns_I["category"]
    for table in tables.values():
        dim, device = table.size()[1], torch.device("cpu")
        for shard in table.local_shards():
            device = shard.tensor.device
        # In float64, where the order of a sum that ranks make together is lost in the rounding to float32.
        sum_Cd = torch.zeros(record.rows + 1, dim, dtype=torch.float64, device=device)
        count_C = torch.zeros(record.rows + 1, dtype=torch.float64, device=device)
        for is_new, shard, index_N, category_N in _categories(table, day, data_set, category_I):
            if not is_new:
                begin = shard.metadata.shard_offsets[1]
                part_Cd = sum_Cd[:, begin : begin + shard.tensor.shape[1]]
                part_Cd.index_add_(0, category_N, shard.tensor[index_N].double())
                if begin == 0:
                    count_C += torch.bincount(category_N, minlength=len(count_C))
        for values in (sum_Cd, count_C):
            dist.all_reduce(values)
        count_C[0] = 0  # of unknown category
        mean_Cd = sum_Cd / count_C.clamp(min=1)[:, None]
        for is_new, shard, index_N, category_N in _categories(table, day, data_set, category_I):
            if is_new:
                known_N = count_C[category_N] > 0
                begin = shard.metadata.shard_offsets[1]
                mean_Nd = mean_Cd[category_N[known_N], begin : begin + shard.tensor.shape[1]]
                shard.tensor.index_copy_(0, index_N[known_N], mean_Nd.to(shard.tensor))


def _categories(
    table: ShardedTensor, day: int, data_set: DataSet, category_I: NDArray[Any]
) -> Iterator[tuple[bool, Shard, Tensor, Tensor]]:
    """Items of this rank's parts of a table: whether they are new, the part, which rows of it, and their categories."""
    for place_N, day_N, id_N in _held_rows(data_set):
        for shard in table.local_shards():
            first, device = shard.metadata.shard_offsets[0], shard.tensor.device
            here_N = (place_N >= first) & (place_N < first + len(shard.tensor))
            for is_new in (False, True):
                chosen_N = here_N & ((day_N > day) == is_new)
                index_N = torch.from_numpy((place_N[chosen_N] - first).astype(np.int64)).to(device)
                category_N = torch.from_numpy(category_I[id_N[chosen_N]].astype(np.int64)).to(device)
                yield is_new, shard, index_N, category_N
