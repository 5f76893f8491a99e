"""Lookups in row-wise shards, with gradient: rows of ids, weighted sums of rows, and all rows of small tables.

An id travels once to the shard that has its row. Of a row, the row travels back once; of a weighted sum, each shard's
part of the sum, so that D floats travel back for a bag and not a row for each of its ids. A lookup waits once for a
GPU: for the numbers of ids, without which nothing can be sent.

B = ids of this rank (or, of a feature with several values, bags), U = distinct ids of it, L = rows that were looked up,
E = entries of bags, I = ids that a shard was sent by all ranks, P = parts: bags of this rank that have an entry on a
shard, one shard's after the other's, S = shards (one a rank), R = rows of a table, d = its dim, V = values of all
tables on a shard.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag, pad
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import QuantizedCommCodecs

from embeddings.batch import DistinctBags
from embeddings.distributed.collectives import (
    Column,
    ColumnsAllToAll,
    all_to_all_with_gradient,
    exchange_counts,
    narrowest,
)
from embeddings.distributed.row_wise import RowWiseLookup, RowWiseTable
from schemas.model import Feature


class RowsOfIds(NamedTuple):
    """Rows that were looked up in one table, and which of them is that of each id."""

    rows_Ld: Tensor
    """float32, with gradient; at least one row."""
    index_B: Tensor
    """int64, 0 .. L - 1."""
    id_L: Tensor | None
    """int32 or int64: the id of each row; None: these are all rows of the table, in order."""
    in_order: bool = False
    """Whether the rows are those of the ids, one after the other."""
    bags: DistinctBags | None = None
    """For a feature with several values: which of the ids make up each bag; None: the ids are what was asked for."""

    def pooled(self) -> "RowsOfIds":
        """The means of the bags' rows, and which of them was asked for each time; as it is where there are no bags."""
        if self.bags is None:
            return self
        return RowsOfIds(self.bags.means(self.rows_Ld, self.index_B), self.bags.slot_X, None)


class _Distinct(NamedTuple):
    """Distinct ids of a rank, in order, before it is known on the host how many they are."""

    id_B: Tensor
    """The first U are the ids; behind them are zeros."""
    slot_B: Tensor
    count_S: Tensor
    """How many of them each shard has."""


def sharded_rows(
    collection: ShardedEmbeddingBagCollection,
    ids: Mapping[Feature, Tensor],
    valid_B: Tensor | None,
    codecs: QuantizedCommCodecs | None = None,
    all_valid: Collection[Feature] = (),
) -> dict[Feature, RowsOfIds]:
    """Rows of ids in some tables of a collection; every rank must call it, and go through its backward pass.

    The collection's own lookup of bags of one would end in a reduce-scatter, in which each shard sends something for
    every bag of every rank: zeros for all that it does not have.

    Args:
        collection: sharded row-wise.
        ids: by feature, int32 or int64 (B,).
        valid_B: bool; what is False is not looked up, its slot is any; None: all are valid.
        codecs: of the rows and of their gradients on their way; None: as they are.
        all_valid: features whose ids are all valid, and may be of another number.
    """
    lookup = RowWiseLookup(collection)
    valid = {feature: None if feature in all_valid else valid_B for feature in ids}
    # On a GPU FBGEMM adds up the gradients of a row that occurs more than 1,024 times in no fixed order; in a run that
    # must be exact, rows are made distinct first.
    exact = torch.are_deterministic_algorithms_enabled() and next(iter(ids.values())).is_cuda
    if lookup.group.size() == 1 and not exact:
        return _local_rows(lookup, ids, valid)
    # An id travels once however often this rank has it, so the gradients of equal ids are added up here, before one
    # row's gradient travels back.
    distinct = {feature: _distinct(id_B, valid[feature], lookup.tables[feature]) for feature, id_B in ids.items()}
    # One row of counts for each shard, with all tables in it: a single small exchange for all of them.
    sent, received = exchange_counts(torch.stack([of.count_S for of in distinct.values()], dim=1), lookup.group)
    requests, id_of = list[Tensor](), dict[Feature, Tensor]()
    for (feature, of), count in zip(distinct.items(), sent, strict=True):
        id_of[feature] = of.id_B[: sum(count)]
        # Rows counted within their shard are smaller numbers, which need fewer bytes.
        block = lookup.tables[feature].block
        requests.append(id_of[feature].remainder(block).to(narrowest(block - 1)))
    arrived = ColumnsAllToAll(lookup.group, list(map(Column, requests, sent, received))).wait()
    rows = lookup.rows(dict(zip(distinct, arrived, strict=True)))
    # The way back: a shard returns as many rows to each rank as that rank requested of it.
    columns = list(map(Column, (rows[feature] for feature in distinct), received, sent))
    returned = all_to_all_with_gradient(columns, lookup.gradient_scale, lookup.group, codecs)
    return {
        feature: _rows_of_ids(rows_Ud, of.slot_B, id_of[feature])
        for (feature, of), rows_Ud in zip(distinct.items(), returned, strict=True)
    }


def _local_rows(
    lookup: RowWiseLookup, ids: Mapping[Feature, Tensor], valid: Mapping[Feature, Tensor | None]
) -> dict[Feature, RowsOfIds]:
    """What `sharded_rows` returns where one rank has all rows: nothing travels, and equal ids stay apart."""

    def looked_up(id_B: Tensor, valid_B: Tensor | None) -> Tensor:
        if valid_B is None or not len(valid_B):
            return id_B
        # Ids that are not valid stand for the first valid one: so no row is touched but those that were asked for, and
        # nobody has to wait for how many those are. Their gradients are 0.
        first = valid_B.to(torch.uint8).argmax(0, keepdim=True)
        return torch.where(valid_B, id_B, id_B.index_select(0, first))

    ids = {feature: looked_up(id_B, valid[feature]) for feature, id_B in ids.items()}
    return {
        feature: _rows_of_ids(rows_Bd, torch.arange(len(rows_Bd), device=rows_Bd.device), ids[feature], True)
        for feature, rows_Bd in lookup.rows(ids).items()
    }


def _rows_of_ids(rows_Ld: Tensor, index_B: Tensor, id_L: Tensor, in_order: bool = False) -> RowsOfIds:
    if len(rows_Ld):
        return RowsOfIds(rows_Ld, index_B, id_L, in_order)
    # On a rank without ids, the sum of no rows is a row of zeros that still belongs to the graph: padding may name it,
    # and the backward pass, which others wait for, runs. Its gradient is 0, whatever id it is said to have.
    return RowsOfIds(rows_Ld.sum(0, keepdim=True), index_B, id_L.new_zeros(1))


def _distinct(id_B: Tensor, valid_B: Tensor | None, table: RowWiseTable) -> _Distinct:
    """The distinct ones of valid ids. Unlike `torch.unique`, it never waits for a GPU."""
    count = len(id_B)
    # Ids that are not valid are behind all others.
    sorted_B, order_B = (id_B if valid_B is None else torch.where(valid_B, id_B, table.rows)).sort(stable=True)
    first_B = torch.ones_like(sorted_B, dtype=torch.bool)
    torch.ne(sorted_B[1:], sorted_B[:-1], out=first_B[1:])
    first_B &= sorted_B < table.rows
    before_B = pad(first_B.cumsum(0), (1, 0))
    number_B = (before_B[1:] - 1).clamp(min=0)
    # What is not the first of its kind is written behind the end.
    place_B = torch.where(first_B, number_B, count)
    distinct_B = sorted_B.new_zeros(count + 1).scatter_(0, place_B, sorted_B)[:count]
    slot_B = torch.empty_like(number_B).scatter_(0, order_B, number_B)
    shards = table.group.size()
    # The end of the last block may lie above the table's rows, and so above what ids of int32 hold.
    end_S = (torch.arange(1, shards + 1, device=id_B.device) * table.block).clamp(max=table.rows).to(sorted_B.dtype)
    ends_S = before_B.index_select(0, torch.searchsorted(sorted_B, end_S))
    return _Distinct(distinct_B, slot_B, torch.diff(ends_S, prepend=ends_S.new_zeros(1)))


class WeightedBags(NamedTuple):
    """Bags of ids, whose weighted sums a rank asks for; the entries of a bag lie together, bag by bag."""

    ids: Mapping[Feature, Tensor]
    """By feature, int32 or int64 (E,)."""
    weight_E: Tensor
    """float32, may require a gradient."""
    valid_E: Tensor
    """bool: whether the entry belongs to its bag, which may be empty."""
    bag_E: Tensor
    """int64: the bag."""
    bags: int
    """How many there are."""


class _Parts(NamedTuple):
    """The entries of a table sorted by shard, before it is known on the host how many they are."""

    order_E: Tensor
    """Which entry each one is; those that are not valid are last."""
    start_E: Tensor
    """Where each part begins; behind the last part, E."""
    bag_E: Tensor
    """The bag of each part."""
    count_S2: Tensor
    """How many entries and how many parts each shard gets."""


def sharded_sums(
    collection: ShardedEmbeddingBagCollection, bags: WeightedBags, codecs: QuantizedCommCodecs | None = None
) -> dict[Feature, Tensor]:
    """The sums ``sum_i w_i e_i`` of bags of ids, by feature float32 (bags, d), with gradients of rows and weights.

    A sharded collection's own lookup gives the weights no gradient, because they travel without. And it ends in a
    reduce-scatter, in which each shard sends something for every bag, though few ids of a bag are on it.

    Every rank must call it, and go through its backward pass.

    Args:
        collection: sharded row-wise.
        bags: of ids in some of its tables.
        codecs: of the sums and of their gradients on their way; None: as they are.
    """
    lookup = RowWiseLookup(collection)
    group = lookup.group
    parts = [_parts(id_E, bags, lookup.tables[feature]) for feature, id_E in bags.ids.items()]
    sent, received = exchange_counts(torch.cat([of.count_S2 for of in parts], dim=1), group)
    ids: list[Column] = []
    weights, lengths, bag_of = list[Column](), list[Column](), list[Tensor]()
    for number, (feature, id_E) in enumerate(bags.ids.items()):
        of, entries, counts = parts[number], slice(2 * number, 2 * number + 1), slice(2 * number + 1, 2 * number + 2)
        (sent_entries,), (received_entries,) = sent[entries], received[entries]
        (sent_parts,), (received_parts,) = sent[counts], received[counts]
        order_I = of.order_E[: sum(sent_entries)]
        block = lookup.tables[feature].block
        row_I = id_E.index_select(0, order_I).remainder(block).to(narrowest(block - 1))
        ids.append(Column(row_I, sent_entries, received_entries))
        weights.append(Column(bags.weight_E.index_select(0, order_I), sent_entries, received_entries))
        # Only shards that have some of a bag's entries hear of the bag, and only they answer.
        start_P = of.start_E[: sum(sent_parts)]
        length_P = torch.diff(start_P, append=start_P.new_full((1,), len(order_I)))
        lengths.append(Column(length_P.to(torch.int32), sent_parts, received_parts))
        bag_of.append(of.bag_E[: sum(sent_parts)])
    # The gradients that come to a shard are divided by the number of ranks, as TorchRec divides them. Those that return
    # to the weights are of the requesting rank's own loss, so the division is undone. TorchRec does the same for
    # collections that it knows as weighted (`CommOpGradientScaling`); these are not.
    # Ids are on their way when the weights are waited for; on every rank, for collectives match by order alone.
    travelling = ColumnsAllToAll(group, [*ids, *lengths])
    arrived_weights = all_to_all_with_gradient(weights, 1 / lookup.gradient_scale, group)
    arrived = travelling.wait()
    rows = lookup.rows(dict(zip(bags.ids, arrived, strict=False)))
    sums = [
        _sums(rows[feature], weight_I, length_P)
        for feature, weight_I, length_P in zip(bags.ids, arrived_weights, arrived[len(ids) :], strict=True)
    ]
    # The way back of the lengths: a part for each.
    columns = [Column(sum_Pd, of.received, of.sent) for sum_Pd, of in zip(sums, lengths, strict=True)]
    returned = all_to_all_with_gradient(columns, lookup.gradient_scale, group, codecs)
    return {
        feature: _sums_of_bags(part_Pd, bag_P, bags.bags)
        for feature, part_Pd, bag_P in zip(bags.ids, returned, bag_of, strict=True)
    }


def _parts(id_E: Tensor, bags: WeightedBags, table: RowWiseTable) -> _Parts:
    shards, count = table.group.size(), len(id_E)
    owner_E = torch.where(bags.valid_E, torch.div(id_E, table.block, rounding_mode="floor"), shards)
    # Few bits, which a radix sort passes over less often; stable, so that the entries of a bag stay together.
    owner_E, order_E = owner_E.to(torch.int16 if shards < 2**15 - 1 else torch.int32).sort(stable=True)
    bag_E = bags.bag_E.index_select(0, order_E)
    begins_E = torch.ones_like(bag_E, dtype=torch.bool)
    begins_E[1:] = (bag_E[1:] != bag_E[:-1]) | (owner_E[1:] != owner_E[:-1])
    begins_E &= owner_E < shards
    before_E = pad(begins_E.cumsum(0), (1, 0))
    # Where the parts begin, and their bags; what begins none is written behind the end.
    place_E = torch.where(begins_E, before_E[:-1], count)
    index_E = torch.arange(count, device=id_E.device)
    start_E = index_E.new_full((count + 1,), count).scatter_(0, place_E, index_E)[:count]
    part_bag_E = bag_E.new_zeros(count + 1).scatter_(0, place_E, bag_E)[:count]
    end_S = torch.searchsorted(owner_E, torch.arange(1, shards + 1, device=id_E.device, dtype=owner_E.dtype))
    end_S2 = torch.stack([end_S, before_E.index_select(0, end_S)], dim=1)
    return _Parts(order_E, start_E, part_bag_E, torch.diff(end_S2, dim=0, prepend=end_S2.new_zeros(1, 2)))


def _sums(rows_Id: Tensor, weight_I: Tensor, length_P: Tensor) -> Tensor:
    """The weighted sum of each part's rows, (P, d)."""
    if not len(length_P):
        # `embedding_bag` of no bags has no gradient, and the lookup's backward pass would not run.
        return rows_Id[:0] * weight_I[:0, None]
    row_I = torch.arange(len(rows_Id), device=rows_Id.device)
    offset_P = pad(length_P.long().cumsum(0), (1, 0))
    sum_Pd: Tensor = embedding_bag(
        row_I, rows_Id, offset_P, mode="sum", per_sample_weights=weight_I, include_last_offset=True
    )
    return sum_Pd


def _sums_of_bags(part_Pd: Tensor, bag_P: Tensor, bags: int) -> Tensor:
    """The sum of each bag's parts, (bags, d); 0 where a bag has none."""
    # `embedding_bag` adds a bag's parts up in the order of the shards, each time in the same; `index_add` on a GPU
    # would not. The parts of a bag came by shard, so they lie apart. A stable sort brings them together, still by
    # shard.
    sorted_P, order_P = bag_P.sort(stable=True)
    offset_B = torch.searchsorted(sorted_P, torch.arange(bags + 1, device=bag_P.device))
    return embedding_bag(order_P, part_Pd, offset_B, mode="sum", include_last_offset=True)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values_V: Tensor, scale: float, group: dist.ProcessGroup) -> Tensor:
        context.scale, context.group = scale, group
        gathered = values_V.new_empty(group.size() * len(values_V))
        dist.all_gather_into_tensor(gathered, values_V.contiguous(), group=group)
        return gathered.view(group.size(), len(values_V))

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient_SV: Tensor) -> tuple[Tensor | None, ...]:
        gradient_V = gradient_SV.new_empty(gradient_SV.shape[1])
        # Every rank has used all rows, so a shard's gradient is the sum of what all ranks have for its rows.
        dist.reduce_scatter_tensor(gradient_V, gradient_SV.flatten(), group=context.group)
        return gradient_V.mul_(context.scale), None, None


def all_gathered_tables(
    collections: Sequence[tuple[torch.nn.Module, Sequence[str]]],
) -> list[dict[str, Tensor]]:
    """All rows of small tables, on every rank; every rank must call it, and must go through its backward pass.

    Each shard sends its rows to all. In a collection's own lookup, every rank would ask every shard for each row.

    Args:
        collections: sharded row-wise; of each, the features whose tables are wanted.

    Returns:
        For each collection, by feature, float32 (R, d), with gradient.
    """
    lookups = [RowWiseLookup(collection) for collection, _ in collections]
    group, scale = lookups[0].group, lookups[0].gradient_scale
    # By collection and table: its rows here.
    local: list[tuple[int, str, RowWiseTable, Tensor]] = []
    for number, (lookup, (_, features)) in enumerate(zip(lookups, collections, strict=True)):
        tables = {feature: lookup.tables[feature] for feature in features}
        device = next(iter(tables.values())).device
        # Looked up rather than read: so the gradient comes back to the kernel, whose optimizer takes its step there.
        rows = lookup.rows(
            {feature: torch.arange(table.local_rows, device=device) for feature, table in tables.items()}
        )
        local += [(number, feature, table, rows[feature]) for feature, table in tables.items()]
    gathered: list[dict[str, Tensor]] = [{} for _ in collections]
    if group.size() == 1:
        for number, feature, _, rows_Rd in local:
            gathered[number][feature] = rows_Rd
        return gathered
    # The last shards are shorter; a collective needs equal parts. One for all tables, whatever their dims.
    parts = [pad(rows_Rd, (0, 0, 0, table.block - len(rows_Rd))) for _, _, table, rows_Rd in local]
    all_SV: Tensor = _AllGather.apply(torch.cat([part_Rd.flatten() for part_Rd in parts]), scale, group)
    of_tables = all_SV.split([part_Rd.numel() for part_Rd in parts], dim=1)
    for (number, feature, table, rows_Rd), of_table in zip(local, of_tables, strict=True):
        # Blocks are full until the rows end, so all filling is behind the last row.
        all_Rd = of_table.reshape(group.size() * table.block, rows_Rd.shape[1])
        gathered[number][feature] = all_Rd[: table.rows]
    return gathered
