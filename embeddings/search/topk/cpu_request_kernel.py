"""The CPU's search loop where all targets have one window, as the candidates of a request do: a product of matrices.

A vector holds the scores of 16 targets, so that no sum goes across its lanes, and each behaviour is read once for all.
Compiled on first use, kept on disk; all that it calls is in this file, for the compiler's cache notices only changes of
that.

T = targets, G = groups of 16 of them, L = 16, N = behaviours of the window, D = dim, K = kept, R = rows of a small
table, P = small tables, B = 4 behaviours.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic
from numpy.typing import NDArray

from embeddings.compiled import compiled

LANES, TOGETHER = 16, 4
"""Targets of a vector, and behaviours whose scores are made at once: as many sums as the processor adds in parallel."""
BLOCK_BYTES = 256 << 10
"""All groups score so many bytes of rows before any moves on: they stay in the second-level cache."""

_NOTHING = np.int64(np.iinfo(np.int64).min)
_LOW = np.int64(0xFFFFFFFF)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_NAN = np.int32(0x7FC00000)

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, LANES)


@intrinsic
def _tile(
    _: Any,
    rows: Any,
    queries: Any,
    dim: Any,
    bias: Any,
    places: Any,
    tables: Any,
    of_tables: Any,
    scores: Any,
    worst: Any,
) -> tuple[Any, Callable[..., ir.Value]]:
    """Write the scores of 4 behaviours and 16 targets, (4, 16). All arguments but two numbers are addresses.

    Args:
        rows: of the behaviours, (4, dim).
        queries: of the targets, (dim, 16).
        dim: D.
        bias: of the behaviours.
        places: int64 (4, tables), which row of small tables' scores each behaviour has.
        tables: P.
        of_tables: scores of the small tables' rows for these targets, (R, 16).
        scores: written.
        worst: the worst scores that the targets keep.

    Returns:
        64 bits: which scores are no less than the worst, or NaN.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        dim, tables = arguments[2], arguments[5]
        row, query, offset, place, of_table, score, least = (
            builder.inttoptr(arguments[number], ir.PointerType()) for number in (0, 1, 3, 4, 6, 7, 8)
        )
        fma = get_or_insert_function(builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fma.v{LANES}f32")
        lanes = _I64(LANES)

        def load(array: ir.Value, at: ir.Value, kind: ir.Type = _VECTOR) -> ir.Value:
            element = _I64 if kind == _I64 else _F32
            return builder.load(builder.gep(array, [at], source_etype=element), typ=kind, align=4)

        def repeated(value: ir.Value) -> ir.Value:
            undefined, zeros = ir.Constant(_VECTOR, ir.Undefined), ir.VectorType(_I32, LANES)
            first = builder.insert_element(undefined, value, _I32(0))
            return builder.shuffle_vector(first, undefined, ir.Constant(zeros, [0] * LANES))

        def loop(
            count: ir.Value, sums: list[ir.Value], step: Callable[[ir.Value, list[ir.Value]], list[ir.Value]]
        ) -> list[ir.Value]:
            """Let ``step`` add to the sums, ``count`` times."""
            before = builder.block
            head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
            builder.branch(head)
            builder.position_at_end(head)
            index, running = builder.phi(_I64), [builder.phi(_VECTOR) for _ in sums]
            index.add_incoming(_I64(0), before)
            for each, start in zip(running, sums, strict=True):
                each.add_incoming(start, before)
            builder.cbranch(builder.icmp_signed("<", index, count), body, after)
            builder.position_at_end(body)
            for each, added in zip(running, step(index, running), strict=True):
                each.add_incoming(added, builder.block)
            index.add_incoming(builder.add(index, _I64(1)), builder.block)
            builder.branch(head)
            builder.position_at_end(after)
            return running

        def add_table(index: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            return [
                builder.fadd(
                    total,
                    load(
                        of_table,
                        builder.mul(load(place, builder.add(builder.mul(tables, _I64(number)), index), _I64), lanes),
                    ),
                )
                for number, total in enumerate(sums)
            ]

        def add_product(index: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            of_queries = load(query, builder.mul(index, lanes))
            values = [load(row, builder.add(builder.mul(dim, _I64(number)), index), _F32) for number in range(TOGETHER)]
            return [
                builder.call(fma, [repeated(value), of_queries, total])
                for value, total in zip(values, sums, strict=True)
            ]

        sums = [repeated(load(offset, _I64(number), _F32)) for number in range(TOGETHER)]
        sums = loop(dim, loop(tables, sums, add_table), add_product)
        worst, mask = load(least, _I64(0)), _I64(0)
        for number, total in enumerate(sums):
            builder.store(total, builder.gep(score, [_I64(number * LANES)], source_etype=_F32), align=4)
            # Unordered: true of NaN too.
            good = builder.bitcast(builder.fcmp_unordered(">=", total, worst), ir.IntType(LANES))
            mask = builder.or_(mask, builder.shl(builder.zext(good, _I64), _I64(number * LANES)))
        return mask

    return types.int64(*[types.int64] * 9), generate


@intrinsic
def _lowest_bit(_: Any, bits: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """The place of the lowest bit that is set."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return types.int64(types.int64), generate


@compiled()
def _sift(heap_K: NDArray[np.int64], key: int, size: int) -> None:
    """Put a key in the place of the least one, which is first."""
    hole = 0
    while True:
        child = 2 * hole + 1
        if child >= size:
            break
        if child + 1 < size and heap_K[child + 1] < heap_K[child]:
            child += 1
        if heap_K[child] >= key:
            break
        heap_K[hole] = heap_K[child]
        hole = child
    heap_K[hole] = key


@compiled()
def search(
    rows_ND: NDArray[np.float32],
    query_GDL: NDArray[np.float32],
    bias_N: NDArray[np.float32],
    scores_GRL: NDArray[np.float32],
    row_NP: NDArray[np.int64],
    column_N: NDArray[np.int64],
    first_group: int,
    end_group: int,
    key_TK: NDArray[np.int64],
) -> None:
    """Search for the targets of some groups.

    Args:
        rows_ND: the behaviours' rows; N is filled up to a multiple of 4.
        query_GDL: the targets' queries.
        bias_N: what is added to each behaviour's score, whatever the target.
        scores_GRL: scores of the rows of all small tables.
        row_NP: for each behaviour, its row of each small table.
        column_N: which behaviour of the window each one is; not filled up.
        first_group: the first group to search for.
        end_group: the end of them.
        key_TK: the keys of `embeddings.search.topk.inputs.ordered`, the best first; must hold the least int64.
    """
    padded, dim = rows_ND.shape
    k, tables = key_TK.shape[1], row_NP.shape[1]
    block = max(BLOCK_BYTES // (max(dim, 1) * 4) // TOGETHER, 1) * TOGETHER
    score_BL = np.empty((TOGETHER, LANES), np.float32)
    bits_BL = score_BL.view(np.int32)
    least_1 = np.empty(1, np.float32)
    least_bits_1 = least_1.view(np.int32)
    # Unfilled lanes of the last group keep nothing.
    worst_T = np.full((end_group - first_group) * LANES, np.inf, np.float32)
    targets = min(key_TK.shape[0], end_group * LANES) - first_group * LANES
    worst_T[:targets] = -np.inf
    rows, queries, bias, places = rows_ND.ctypes.data, query_GDL.ctypes.data, bias_N.ctypes.data, row_NP.ctypes.data
    all_tables, scores, worst = scores_GRL.ctypes.data, score_BL.ctypes.data, worst_T.ctypes.data
    for begin in range(0, padded, block):
        for group in range(first_group, end_group):
            query, lanes = queries + group * dim * LANES * 4, (group - first_group) * LANES
            of_tables = all_tables + group * scores_GRL.shape[1] * LANES * 4
            for behavior in range(begin, min(begin + block, padded), TOGETHER):
                good = _tile(
                    rows + behavior * dim * 4,
                    query,
                    dim,
                    bias + behavior * 4,
                    places + behavior * tables * 8,
                    tables,
                    of_tables,
                    scores,
                    worst + lanes * 4,
                )
                while good:
                    place = _lowest_bit(good)
                    good &= good - 1
                    at, lane = behavior + (place >> 4), place & (LANES - 1)
                    # NaN is above infinity too, so that a broken row reaches the lanes without a target.
                    if at >= len(column_N) or lanes + lane >= targets:
                        continue
                    score = score_BL[place >> 4, lane] + np.float32(0.0)
                    score_BL[place >> 4, lane] = score  # -0.0 becomes 0.0
                    bits = bits_BL[place >> 4, lane] if score == score else _NAN
                    if bits < 0:
                        bits ^= _MAGNITUDE
                    key = (np.int64(bits) << 32) | (_LOW - column_N[at])
                    heap_K = key_TK[group * LANES + lane]
                    if key > heap_K[0]:
                        _sift(heap_K, key, k)
                        high = np.int32(heap_K[0] >> 32)
                        # Of a full selection, the score of the worst; keys of NaN are above all.
                        least_bits_1[0] = high if high >= 0 else high ^ _MAGNITUDE
                        worst_T[lanes + lane] = least_1[0] if heap_K[0] != _NOTHING else -np.inf
    for target in range(first_group * LANES, first_group * LANES + targets):
        heap_K = key_TK[target]
        # The least of what is left goes to the end.
        for size in range(k - 1, 0, -1):
            least, last = heap_K[0], heap_K[size]
            _sift(heap_K, last, size)
            heap_K[size] = least
