"""The GPU's search loop, in Triton: score a block of a window, keep the K best keys.

A variant of `search` is compiled for each `embeddings.search.topk.cuda.Mode` and type of rows, and for nothing else:
what differs from batch to batch, or from table to table, is an argument whose value the compiler takes no notice of
(`do_not_specialize`). What a search has or lacks (additive scores, parts, dims that vectors fit) are branches that all
threads take alike, so they cost little.

Arguments are `tl.tensor` and `tl.constexpr` by annotation, because Triton reads annotations as code, in which it knows
no other module's names.

R = rows of the table, D = dim, M = behaviours of all users, T = targets, W = (target, behaviour) pairs, K = kept,
P = parts of the score, X = keys of a target, d = dim of a small table. Pointers are named for what they point to.
"""

import triton
import triton.language as tl

from embeddings.intervals import INTERVAL_BUCKETS
from embeddings.search.topk.inputs import NOTHING, PartKind

PART_FIELDS = 10
"""int64 numbers of a part: kind, rows, row stride, R, query, query stride, d, column, value, mask.

Addresses of tensors where it says rows, query, column and value; 0 for a query if `rows` are scores already, for a
column that is the behaviours' index, and for a value that the kind has not. Rows and queries begin at multiples of 16
bytes.
"""

_NOTHING = tl.constexpr(NOTHING)
_LOW = tl.constexpr(0xFFFFFFFF)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_NAN = tl.constexpr(0x7FC00000)
_FIELDS = tl.constexpr(PART_FIELDS)
_POSITION = tl.constexpr(int(PartKind.POSITION))
_INTERVAL = tl.constexpr(int(PartKind.INTERVAL))
_MATCH = tl.constexpr(int(PartKind.MATCH))
_LAST_BUCKET = tl.constexpr(INTERVAL_BUCKETS - 1)
_LONGEST_INTERVAL = tl.constexpr((1 << INTERVAL_BUCKETS) - 1)
_PART_D = tl.constexpr(16)
_UNALIGNED_D = tl.constexpr(4)
_SMALL_D = tl.constexpr(16)
_LARGE_D = tl.constexpr(32)

# All but the constants of a variant: nothing about their values, alignment included, makes a new one.
_VARYING = (
    "rows_RD",
    "row_stride",
    "aligned",
    "scale_R",
    "ids_M",
    "wide_ids",
    "start_T",
    "end_T",
    "query_TD",
    "dim",
    "part_PF",
    "parts",
    "first_pair_T",
    "additive_W",
    "has_additive",
    "first_target",
    "columns",
    "share",
    "k",
    "key_TX",
    "score_TK",
    "index_TK",
)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_VARYING)
def search(
    rows_RD: tl.tensor,
    row_stride: tl.int64,
    aligned: tl.int32,
    scale_R: tl.tensor,
    ids_M: tl.int64,
    wide_ids: tl.int32,
    start_T: tl.tensor,
    end_T: tl.tensor,
    query_TD: tl.tensor,
    dim: tl.int32,
    part_PF: tl.tensor,
    parts: tl.int32,
    first_pair_T: tl.tensor,
    additive_W: tl.tensor,
    has_additive: tl.int32,
    first_target: tl.int64,
    columns: tl.int64,
    share: tl.int64,
    k: tl.int32,
    key_TX: tl.tensor,
    score_TK: tl.tensor,
    index_TK: tl.tensor,
    kept: tl.constexpr,
    block_n: tl.constexpr,
) -> None:
    """Search one share of one target's window.

    Where ``columns`` is 0, the share is the whole window, and the K best are written as scores and indices. Otherwise
    keys are written, padded with NOTHING, for others to choose from: of each share the ``kept`` best, or all of the
    window if K is more than ``kept``.
    """
    # In 64 bits: the products with it below may exceed 32.
    written, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    target = first_target + written
    start = tl.load(start_T + target)
    length = tl.load(end_T + target) - start
    every = k > kept and columns > 0
    begin = number * share
    # Where keys of all are written, those behind the window's end are, too, as padding.
    end = tl.minimum(begin + share, columns if every else length)
    pair = start
    if has_additive:
        pair = tl.load(first_pair_T + target)
    # The best so far stay in registers, the worst of them first; only they are written, at the end.
    slot = tl.arange(0, kept)
    best = tl.full([kept], _NOTHING, tl.int64)
    kth = tl.min(best)
    for block in range(begin, end, block_n):
        column = block + tl.arange(0, block_n)
        valid = column < length
        # Behind the window's end nothing is read: the mask stands for zeros, and the key is NOTHING.
        row = _integers(ids_M, wide_ids, start + column, valid)
        query_D = query_TD + target * dim
        if aligned == 0:
            score = _dot(rows_RD, row_stride, row, valid, query_D, dim, 1, block_n, _UNALIGNED_D)
        elif rows_RD.dtype.element_ty == tl.float32:
            # 64 bytes of a row at a time, as of the narrower types below; more would not stay in registers.
            score = _dot(rows_RD, row_stride, row, valid, query_D, dim, 16, block_n, _SMALL_D)
        elif dim <= _SMALL_D:
            score = _dot(rows_RD, row_stride, row, valid, query_D, dim, 16, block_n, _SMALL_D)
        else:
            score = _dot(rows_RD, row_stride, row, valid, query_D, dim, 16, block_n, _LARGE_D)
        if rows_RD.dtype.element_ty == tl.int8:
            score *= tl.load(scale_R + row, mask=valid, other=0.0)
        for part in range(parts):
            score += _part_score(part_PF + part * _FIELDS, target, start + column, valid, block_n)
        if has_additive:
            score += tl.load(additive_W + pair + column, mask=valid, other=0.0)
        key = tl.where(valid, _ordered(score, column), _NOTHING)
        if every:
            tl.store(key_TX + written * columns + column, key, mask=column < columns)
        # After the first blocks most blocks have no key that is good enough, and need no sorting.
        elif tl.max(key) > kth:
            # Ascending keys against descending ones: the greater of each two are the best of both, and a bitonic
            # sequence, which a merge alone sorts.
            best = tl.bitonic_merge(tl.maximum(best, tl.topk(key, kept)))
            kth = tl.min(tl.where(slot >= kept - k, best, tl.max(best)))
    if columns == 0:
        _write(best, start, k, score_TK + target * k, index_TK + target * k, kept)
    elif every == 0:
        tl.store(key_TX + written * columns + number * kept + slot, best)


@triton.jit
def _integers(address: tl.tensor, wide: tl.tensor, index: tl.tensor, valid: tl.tensor) -> tl.tensor:
    """Elements of an int32 tensor, or of an int64 one if ``wide``, as int64; 0 where not valid."""
    if wide:
        values = tl.load(address.to(tl.pointer_type(tl.int64)) + index, mask=valid, other=0)
    else:
        values = tl.load(address.to(tl.pointer_type(tl.int32)) + index, mask=valid, other=0).to(tl.int64)
    return values


@triton.jit
def _dot(
    rows_RD: tl.tensor,
    row_stride: tl.tensor,
    row: tl.tensor,
    valid: tl.tensor,
    query_D: tl.tensor,
    dim: tl.tensor,
    alignment: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
) -> tl.tensor:
    """Dot products of rows with a query, float32 (block_n,).

    With an ``alignment`` of 16 each row begins at a multiple of 16 bytes, and ends at one: it is read in vectors.
    """
    # Elements of ``alignment`` bytes. Divided and multiplied by it, a number is seen to be a multiple of it.
    vector: tl.constexpr = (alignment * 8) // rows_RD.dtype.element_ty.primitive_bitwidth
    if alignment > 1:
        dim = (dim // vector) * vector
        row_stride = (row_stride // vector) * vector
    total = tl.zeros([block_n], tl.float32)
    for first in range(0, dim, block_d):
        # The last block of a dim that is no multiple is masked, with zeros on both sides.
        d = first + tl.arange(0, block_d)
        inside = d < dim
        query = tl.load(query_D + d, mask=inside, other=0.0)
        places = rows_RD + (row[:, None] * row_stride + d[None, :])
        if alignment > 1:
            places = tl.multiple_of(places, [1, alignment])
        values = tl.load(places, mask=valid[:, None] & inside[None, :], other=0)
        total += tl.sum(values.to(tl.float32) * query[None, :], axis=1)
    return total


@triton.jit
def _part_score(
    part_F: tl.tensor, target: tl.tensor, index: tl.tensor, valid: tl.tensor, block_n: tl.constexpr
) -> tl.tensor:
    """What a small table adds, float32 (block_n,); as `embeddings.search.topk.reference.part_row` finds its rows."""
    kind = tl.load(part_F)
    rows_Rd = tl.load(part_F + 1).to(tl.pointer_type(tl.float32))
    query_Qd = tl.load(part_F + 4)
    column_M = tl.load(part_F + 7)
    value_T = tl.load(part_F + 8)
    row = index
    if column_M:
        row = _integers(column_M, kind == _INTERVAL, index, valid)
    if value_T:
        difference = tl.load(value_T.to(tl.pointer_type(tl.int64)) + target) - row
        if kind == _POSITION:
            row = difference & tl.load(part_F + 9)
        elif kind == _INTERVAL:
            row = _bucket(difference)
        else:
            row = (difference == 0).to(tl.int64)
    row = tl.minimum(tl.maximum(row, 0), tl.load(part_F + 3) - 1)
    if query_Qd:
        query_d = query_Qd.to(tl.pointer_type(tl.float32)) + target * tl.load(part_F + 5)
        dim = tl.load(part_F + 6).to(tl.int32)
        score = _dot(rows_Rd, tl.load(part_F + 2), row, valid, query_d, dim, 16, block_n, _PART_D)
    else:
        score = tl.load(rows_Rd + row, mask=valid, other=0.0)
    return score


@triton.jit
def _bucket(seconds: tl.tensor) -> tl.tensor:
    """The buckets of `embeddings.intervals.interval_bucket`, int64."""
    # Clamped to the last bucket, an integer is exact in float64, whose exponent is the logarithm.
    clamped = tl.minimum(tl.maximum(seconds, 0), _LONGEST_INTERVAL) + 1
    exponent = (clamped.to(tl.float64).to(tl.int64, bitcast=True) >> 52) - 1023
    return tl.minimum(1 + exponent, _LAST_BUCKET)


@triton.jit
def _ordered(score: tl.tensor, column: tl.tensor) -> tl.tensor:
    """The keys of `embeddings.search.topk.inputs.ordered`."""
    # -0.0 equals 0.0, and must have the same bits.
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    # NaN is the only value that differs from itself; one bit pattern for all of them, above infinity's.
    bits = tl.where(score == score, bits, _NAN)
    monotonic = tl.where(bits < 0, bits ^ _MAGNITUDE, bits)
    return (monotonic.to(tl.int64) << 32) | (_LOW - column.to(tl.int64))


@triton.jit
def _write(
    best: tl.tensor, start: tl.tensor, k: tl.tensor, score_K: tl.tensor, index_K: tl.tensor, kept: tl.constexpr
) -> None:
    """Write ascending keys as `embeddings.search.topk.inputs.decoded` decodes them, and padding up to K."""
    slot = tl.arange(0, kept)
    rank = kept - 1 - slot
    # The shift is arithmetic, so the upper half keeps its sign.
    bits = (best >> 32).to(tl.int32)
    score = tl.where(bits < 0, bits ^ _MAGNITUDE, bits).to(tl.float32, bitcast=True)
    found = best != _NOTHING
    tl.store(score_K + rank, tl.where(found, score, -float("inf")), mask=rank < k)
    tl.store(index_K + rank, tl.where(found, start + _LOW - (best & _LOW), -1), mask=rank < k)
    for first in range(kept, k, kept):
        padding = first + slot
        tl.store(score_K + padding, tl.full([kept], -float("inf"), tl.float32), mask=padding < k)
        tl.store(index_K + padding, tl.full([kept], -1, tl.int64), mask=padding < k)
