"""Top-K search on a GPU: one pass over the rows; up to a K of `BLOCK_N` nothing of size (T, N) is written.

R = rows of the table, D = dim, M = behaviours of all users, T = targets, W = (target, behaviour) pairs, N = longest
window, K = kept, X = keys of a target: those of its whole window, or the best of each part of it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from embeddings.search.topk.inputs import TopKInputs
from embeddings.search.topk.keys import NOTHING, decoded

BLOCK_N, BLOCK_D = 128, 32
"""Behaviours, and dims of each, that are multiplied at a time; more would not stay in registers."""
PROGRAMS = 2048
"""Windows are cut into parts as long as there are fewer programs than this, so that few targets fill a GPU too."""
KEY_BYTES = 256 << 20
"""Keys that are written at a time."""

_NOTHING = tl.constexpr(NOTHING)
_LOW = tl.constexpr(0xFFFFFFFF)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_NAN = tl.constexpr(0x7FC00000)


def top_k_cuda(inputs: TopKInputs, longest: int) -> tuple[Tensor, Tensor]:
    """The search of `embeddings.search.topk.api.top_k`; inputs are checked, and ``longest`` is their longest window."""
    rows_RD, scale_R, start_T, k = inputs.rows_RD, inputs.scale_R, inputs.start_T, inputs.k
    targets, dim = inputs.query_TD.shape
    if not targets or not longest:
        return decoded(start_T.new_empty(targets, 0), start_T, k)
    rows_RD = rows_RD if rows_RD.stride(1) == 1 else rows_RD.contiguous()
    # Triton's blocks have a power of two of elements.
    kept = max(triton.next_power_of_2(min(k, longest)), 2)
    # A larger K would not stay in registers: then all keys are written, and torch selects the best.
    fused = kept <= BLOCK_N
    # A program searches one part of one target's window.
    parts = min(triton.cdiv(PROGRAMS, targets), triton.cdiv(longest, BLOCK_N)) if fused else 1
    part = triton.cdiv(triton.cdiv(longest, parts), BLOCK_N) * BLOCK_N
    columns = parts * kept if fused else longest
    best = []
    # So many targets at a time that their keys, of 8 bytes, stay within the limit.
    step = max(1, KEY_BYTES // (8 * columns))
    for begin in range(0, targets, step):
        some = slice(begin, min(begin + step, targets))
        key_TX = torch.empty(some.stop - begin, columns, dtype=torch.int64, device=rows_RD.device)
        _search[(some.stop - begin, parts)](
            rows_RD,
            rows_RD.stride(0),
            scale_R if scale_R is not None else inputs.additive_W,  # not read: a kernel wants a tensor
            inputs.ids_M.contiguous(),
            start_T[some].contiguous(),
            inputs.end_T[some].contiguous(),
            inputs.first_pair_T[some],
            inputs.query_TD[some].float().contiguous(),
            inputs.additive_W.contiguous(),
            key_TX,
            columns,
            dim,
            part,
            scaled=scale_R is not None,
            fused=fused,
            kept=kept if fused else 1,
            block_n=BLOCK_N,
            block_d=min(BLOCK_D, triton.next_power_of_2(max(dim, 1))),
        )
        # Keys sort as the search must, so an ordinary top K of integers merges the parts.
        best.append(key_TX.topk(min(k, columns)).values)
    return decoded(torch.cat(best), start_T, k)


@triton.jit
def _search(
    rows_RD: Any,
    row_stride: Any,
    scale_R: Any,
    ids_M: Any,
    start_T: Any,
    end_T: Any,
    first_pair_T: Any,
    query_TD: Any,
    additive_W: Any,
    key_TX: Any,
    columns: Any,
    dim: Any,
    part: Any,
    scaled: tl.constexpr,
    fused: tl.constexpr,
    kept: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """Write the keys of one part of one target's window: the ``kept`` best of them, or all, padded with NOTHING."""
    # In 64 bits: the products with it below may exceed 32.
    target, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = tl.load(start_T + target)
    length = tl.load(end_T + target) - start
    pair = tl.load(first_pair_T + target)
    begin = number * part
    written = key_TX + target * columns
    # The best so far stay in registers; only they are written, at the end.
    best = tl.full([kept], _NOTHING, tl.int64)
    worst = tl.min(best)
    end = tl.minimum(begin + part, length) if fused else columns
    for block in range(begin, end, block_n):
        column = block + tl.arange(0, block_n)
        valid = column < length
        # Behind the window's end nothing is read: the mask stands for zeros, and the key is NOTHING.
        row = tl.load(ids_M + start + column, mask=valid, other=0).to(tl.int64)
        score = _dot(rows_RD, row_stride, row, valid, query_TD + target * dim, dim, block_n, block_d)
        if scaled:
            score *= tl.load(scale_R + row, mask=valid, other=0.0)
        score += tl.load(additive_W + pair + column, mask=valid, other=0.0)
        key = tl.where(valid, _ordered(score, column), _NOTHING)
        if fused:
            # After the first blocks most blocks have no key that is good enough, and need no sorting.
            if tl.max(key) > worst:
                both = tl.reshape(tl.join(best, tl.topk(key, kept)), [2 * kept])
                best = tl.topk(both, kept)
                worst = tl.min(best)
        else:
            tl.store(written + column, key, mask=column < columns)
    if fused:
        tl.store(written + number * kept + tl.arange(0, kept), best)


@triton.jit
def _dot(
    rows_RD: Any,
    row_stride: Any,
    row: Any,
    valid: Any,
    query_D: Any,
    dim: Any,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
) -> Any:
    """Dot products of the rows with the query, float32 (block_n,)."""
    total = tl.zeros([block_n], tl.float32)
    for first in range(0, dim, block_d):
        # The last block of a dim that is no multiple is masked, with zeros on both sides.
        d = first + tl.arange(0, block_d)
        inside = d < dim
        query = tl.load(query_D + d, mask=inside, other=0.0)
        values = tl.load(
            rows_RD + row[:, None] * row_stride + d[None, :], mask=valid[:, None] & inside[None, :], other=0
        )
        total += tl.sum(values.to(tl.float32) * query[None, :], axis=1)
    return total


@triton.jit
def _ordered(score: Any, column: Any) -> Any:
    """The keys of `embeddings.search.topk.keys.ordered`."""
    # -0.0 equals 0.0, and must have the same bits.
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    # NaN is the only value that differs from itself; one bit pattern for all of them, above infinity's.
    bits = tl.where(score == score, bits, _NAN)
    monotonic = tl.where(bits < 0, bits ^ _MAGNITUDE, bits)
    return (monotonic.to(tl.int64) << 32) | (_LOW - column.to(tl.int64))
