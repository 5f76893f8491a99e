"""The CPU's search loop: gather a row, take its dot product, keep the K best keys. Compiled on first use, kept on disk.

All compiled code of the search is in this one file, because the compiler's cache on disk notices only changes of the
file of what it compiles, not of what that calls in other files.

Half precision arrives as integers of 16 bits, which the compiler can handle: int16 holds float16, uint16 holds
bfloat16. Sums are in float32 and in an order that depends on D alone, so results do not depend on the threads.

R = rows of the table, D = dim, M = behaviours of all users, T = targets, W = (target, behaviour) pairs, K = kept,
U = units of work: a few targets each, whose windows overlap if there are several, Q = targets of the largest unit,
B = behaviours of a block, P = parts of the score, X = any number of keys.
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
from embeddings.prefetch import into_second_level, past_second_level
from embeddings.search.topk.cpu_arguments import SearchWindows, TableRows, Units

LANES, SUMS = 16, 4
"""Floats of a vector, and vectors that are summed independently, so that no addition waits for the one before."""
PREFETCHED_ROWS, PREFETCHED_LINES = 16, 4
"""Rows that are prefetched, and cache lines of each; the processor itself finds the lines that follow."""
SHORT_LINES, SMALL_TABLE_BYTES = 2, 4 << 20
"""Rows of so few lines, in a larger table, are fetched past the second-level cache: a quarter of the time less."""
LINE_BYTES = 64
BLOCK_BYTES = 16 << 10
"""All targets of a unit score so many bytes of rows before any moves on: the rows stay in the first-level cache."""
BLOCK_BEHAVIORS = 1 << 10
"""Behaviours of a block at most, if rows are short or there are none."""

VALUE, POSITION, INTERVAL, MATCH = range(4)
"""The kinds of `embeddings.search.topk.inputs.PartKind`; the compiler knows plain integers alone."""
INTERVAL_LIMIT = 1 << 33
"""Seconds from which on all intervals are in the last bucket."""

NOTHING = np.int64(np.iinfo(np.int64).min)
"""Less than any key."""
_LOW = np.int64(0xFFFFFFFF)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_NAN = np.int32(0x7FC00000)
_MINUS_INFINITY = np.int32(-0x800000)

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)

Keys = NDArray[np.int64]


# Numba has no half-precision floats and does not always use vectors for a sum, so the product is written in LLVM's
# own language.
@intrinsic
def dot(_: Any, rows_RD: Any, row: Any, query: Any, dim: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """float32 product of the row of ``rows_RD``'s type at an address with the float32 query at another.

    Vectors of 16 lanes, then of 4, then single floats; on a processor with shorter vectors the compiler splits them.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        # Addresses: Numba has no arrays of half-precision floats, and would make a slice for each row.
        row, query = (builder.inttoptr(address, ir.PointerType()) for address in arguments[1:3])
        return _dot(builder, rows_RD.dtype, row, query, arguments[3])

    return types.float32(rows_RD, types.int64, types.int64, types.int64), generate


def _load(kind: types.Type, element: ir.Type) -> Any:
    @intrinsic
    def load(_: Any, address: Any, index: Any) -> tuple[Any, Callable[..., ir.Value]]:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
            array = builder.inttoptr(arguments[0], ir.PointerType())
            return builder.load(builder.gep(array, [arguments[1]], source_etype=element), typ=element)

        return kind(types.int64, types.int64), generate

    return load


def _dot(builder: ir.IRBuilder, kind: types.Type, row: ir.Value, query: ir.Value, dim: ir.Value) -> ir.Value:
    stored = {types.float32: _F32, types.int16: ir.HalfType(), types.uint16: ir.IntType(16), types.int8: ir.IntType(8)}

    def load(element: ir.Type, array: ir.Value, at: ir.Value, lanes: int) -> ir.Value:
        pointer = builder.gep(array, [at], source_etype=element)
        # Rows of a slice may begin anywhere: an aligned load would fault.
        return builder.load(pointer, typ=ir.VectorType(element, lanes), align=1)

    def widened(values: ir.Value, lanes: int) -> ir.Value:
        floats, integers = ir.VectorType(_F32, lanes), ir.VectorType(_I32, lanes)
        if kind == types.float32:
            return values
        if kind == types.int16:
            return builder.fpext(values, floats)
        if kind == types.uint16:
            # A bfloat16 is the upper half of the float32 of the same value.
            high = builder.shl(builder.zext(values, integers), ir.Constant(integers, [16] * lanes))
            return builder.bitcast(high, floats)
        return builder.sitofp(values, floats)

    def multiply_add(at: ir.Value, total: ir.Value, lanes: int) -> ir.Value:
        floats = ir.VectorType(_F32, lanes)
        # A fused multiply-add is asked for by name: without fast-math flags LLVM would keep two instructions and round
        # twice.
        fma = get_or_insert_function(builder.module, ir.FunctionType(floats, [floats] * 3), f"llvm.fma.v{lanes}f32")
        values = widened(load(stored[kind], row, at, lanes), lanes)
        return builder.call(fma, [values, load(_F32, query, at, lanes), total])

    def loop(at: ir.Value, totals: list[ir.Value], lanes: int) -> tuple[ir.Value, list[ir.Value]]:
        """Add products to ``totals`` as long as a whole step of them fits; returns where it ended, and the sums."""
        before = builder.block
        # A loop of LLVM by hand: `head` asks whether a whole step still fits, `body` does it. What changes from turn to
        # turn, the index and the sums, are phi nodes: their value depends on the block that was left.
        head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(_I64)
        sums = [builder.phi(total.type) for total in totals]
        index.add_incoming(at, before)
        for total, running in zip(totals, sums, strict=True):
            running.add_incoming(total, before)
        following = builder.add(index, _I64(lanes * len(totals)))
        builder.cbranch(builder.icmp_signed("<=", following, dim), body, after)
        builder.position_at_end(body)
        for number, running in enumerate(sums):
            added = multiply_add(builder.add(index, _I64(number * lanes)), running, lanes)
            running.add_incoming(added, builder.block)
        index.add_incoming(following, builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        return index, sums

    def across(total: ir.Value, lanes: int) -> ir.Value:
        """The sum of a vector's lanes."""
        add = get_or_insert_function(
            builder.module, ir.FunctionType(_F32, [_F32, total.type]), f"llvm.vector.reduce.fadd.v{lanes}f32"
        )
        # -0.0 is the neutral element of an addition of floats. With "reassoc" the lanes may be added in a tree; without
        # it they would be added one by one.
        return builder.call(add, [_F32(-0.0), total], fastmath=("reassoc",))

    def zero(lanes: int) -> ir.Value:
        return ir.Constant(ir.VectorType(_F32, lanes), [0.0] * lanes)

    # Four vectors of 16 at a time, then one, then vectors of 4, then single floats. Each loop goes on where the last
    # ended.
    at, (a, b, c, d) = loop(_I64(0), [zero(LANES)] * SUMS, LANES)
    at, (wide,) = loop(at, [builder.fadd(builder.fadd(a, b), builder.fadd(c, d))], LANES)
    at, (narrow,) = loop(at, [zero(4)], 4)
    _, (single,) = loop(at, [zero(1)], 1)
    rest = builder.fadd(across(narrow, 4), builder.extract_element(single, _I32(0)))
    return builder.fadd(across(wide, LANES), rest)


_float_at, _int_at, _long_at = _load(types.float32, _F32), _load(types.int32, _I32), _load(types.int64, _I64)


def _instruction(result: types.Type, argument: types.Type, build: Callable[[ir.IRBuilder, ir.Value], ir.Value]) -> Any:
    @intrinsic
    def apply(_: Any, number: Any) -> tuple[Any, Callable[..., ir.Value]]:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
            return build(builder, arguments[0])

        return result(argument), generate

    return apply


# A float32's bits as int32; how many bits a positive int64 has, 1 + floor(log2).
_bits = _instruction(types.int32, types.float32, lambda builder, value: builder.bitcast(value, _I32))
_bit_length = _instruction(
    types.int64, types.int64, lambda builder, value: builder.sub(_I64(64), builder.ctlz(value, ir.IntType(1)(0)))
)


@compiled()
def prefetch_row(rows_RD: NDArray[Any], address: int | np.int64, lines: int) -> None:
    """Ask for the first cache lines of the row at ``address`` and go on; harmless at any address."""
    if lines <= SHORT_LINES and rows_RD.size * rows_RD.itemsize > SMALL_TABLE_BYTES:
        for line in range(lines):
            past_second_level(address + line * LINE_BYTES)
    else:
        for line in range(min(lines, PREFETCHED_LINES)):
            into_second_level(address + line * LINE_BYTES)


@compiled()
def ordered(score: Any, column: int) -> Any:
    """A key that sorts as (score, earlier column first): the float's bits made monotonic, above the column.

    NaN sorts above infinity; -0.0 equals 0.0.
    """
    score = score + np.float32(0.0)  # -0.0 becomes 0.0
    bits = _bits(score) if score == score else _NAN
    if bits < 0:
        bits ^= _MAGNITUDE
    return (np.int64(bits) << 32) | (_LOW - column)


@compiled()
def keep_greatest(keys_X: Keys, size: int, k: int) -> None:
    """Reorder the first ``size`` keys, all different, such that the k greatest come first and the k-th of them last.

    It is a quickselect with the median of three as its pivot: linear in ``size``, where sorting would not be.
    """
    low, high = 0, size
    while high - low > 1:
        middle, last = (low + high) >> 1, high - 1
        first_key, middle_key, last_key = keys_X[low], keys_X[middle], keys_X[last]
        # The pivot goes last, keys above it go first, and then it is swapped to where it belongs.
        pivot = max(min(first_key, middle_key), min(max(first_key, middle_key), last_key))
        at = low if pivot == first_key else (middle if pivot == middle_key else last)
        keys_X[at], keys_X[last] = last_key, pivot
        greater = low
        # Every key is swapped, needed or not: a branch on the comparison would be mispredicted half of the time.
        for index in range(low, last):
            key = keys_X[index]
            keys_X[index] = keys_X[greater]
            keys_X[greater] = key
            greater += key > pivot
        keys_X[last], keys_X[greater] = keys_X[greater], pivot
        # The pivot is the k-th greatest: done. Else go on in the half that the k-th is in.
        if greater == k - 1:
            return
        if greater < k - 1:
            low = greater + 1
        else:
            high = greater


@compiled()
def sort_descending(keys_X: Keys, spare_X: Keys, size: int) -> None:
    """Sort the first ``size`` keys: runs of 8 by insertion, then merged in pairs."""
    run = 8
    for begin in range(0, size, run):
        for index in range(begin + 1, min(begin + run, size)):
            key, hole = keys_X[index], index
            while hole > begin and keys_X[hole - 1] < key:
                keys_X[hole] = keys_X[hole - 1]
                hole -= 1
            keys_X[hole] = key
    while run < size:
        for begin in range(0, size - run, 2 * run):
            left, middle, end = begin, begin + run, min(begin + 2 * run, size)
            # Only the left run is copied away: merged keys are written from its start and cannot overtake the right
            # run.
            spare_X[begin:middle] = keys_X[begin:middle]
            right, out = middle, begin
            while left < middle and right < end:
                one, other = spare_X[left], keys_X[right]
                keys_X[out] = max(one, other)
                # No branch: one of the two comparisons is true, and it moves its side on.
                left += one > other
                right += one <= other
                out += 1
            # What is left of the right run is in its place already.
            while left < middle:
                keys_X[out] = spare_X[left]
                left += 1
                out += 1
        run *= 2


@compiled()
def part_row(part: Any, target: int, behavior: int) -> Any:
    """The row of a small table that a pair has; beyond the last one it is the last one."""
    if part.kind == VALUE:
        return np.int64(_int_at(part.column_M, behavior))
    if part.kind == INTERVAL:
        seconds = _long_at(part.value_T, target) - _long_at(part.column_M, behavior)
        return min(_bit_length(min(max(seconds, 0), INTERVAL_LIMIT) + 1), part.rows - 1)
    value = np.int64(_int_at(part.column_M, behavior)) if part.column_M else np.int64(behavior)
    if part.kind == MATCH:
        return np.int64(_long_at(part.value_T, target) == value)
    return min(max((_long_at(part.value_T, target) - value) & part.mask, 0), part.rows - 1)


@compiled()
def add_parts(parts_P: NDArray[Any], target: int, begin: int, end: int, score_B: NDArray[np.float32]) -> None:
    """Add what small tables make of a target's score of the behaviours ``begin`` .. ``end`` to ``score_B``."""
    for number in range(len(parts_P)):
        part = parts_P[number]
        if part.score_R:
            for behavior in range(begin, end):
                score_B[behavior - begin] += _float_at(part.score_R, part_row(part, target, behavior))
        else:
            query = part.query_Td + target * part.dim * 4
            for behavior in range(begin, end):
                row = part.rows_Rd + part_row(part, target, behavior) * part.dim * 4
                score_B[behavior - begin] += dot(score_B, row, query, part.dim)


@compiled()
def search(
    table: TableRows,
    windows: SearchWindows,
    units: Units,
    first_unit: int,
    end_unit: int,
    bits_TK: NDArray[np.int32],
    index_TK: NDArray[np.int64],
) -> None:
    """Search for the targets of some units.

    Args:
        table: the rows.
        windows: what each target searches.
        units: which targets are searched for together.
        first_unit: the first unit to search for.
        end_unit: the end of them.
        bits_TK: the float32 scores' bits; written.
        index_TK: which behaviours they are of; written.
    """
    rows_RD, row_bytes, scale_R = table.rows_RD, table.row_bytes, table.scale_R
    ids_M, start_T, end_T = windows.ids_M, windows.start_T, windows.end_T
    query_TD, additive_W, first_pair_T = windows.query_TD, windows.additive_W, windows.first_pair_T
    # A copy of this thread's own: whoever is handed an array is counted, in memory that belongs to the array.
    parts_P = windows.parts_P.copy()
    dim, k = query_TD.shape[1], bits_TK.shape[1]
    base, queries = rows_RD.ctypes.data, query_TD.ctypes.data
    lines = (dim * rows_RD.itemsize + LINE_BYTES - 1) // LINE_BYTES
    block = BLOCK_BEHAVIORS
    if dim:
        block = min(max(BLOCK_BYTES // (dim * rows_RD.itemsize), PREFETCHED_ROWS), BLOCK_BEHAVIORS)
    score_B = np.empty(block, np.float32)
    most = 0
    for unit in range(first_unit, end_unit):
        most = max(most, units.offset_U[unit + 1] - units.offset_U[unit])
    # Keys that beat the k-th best so far collect behind the k best. Only when there is no more room are the k best
    # selected anew: a heap would do work for each key.
    keys_QX = np.empty((most, 2 * k + 32), np.int64)
    size_Q, worst_Q = np.empty(most, np.int64), np.empty(most, np.int64)
    spare_X = np.empty(k, np.int64)
    room = keys_QX.shape[1]
    for unit in range(first_unit, end_unit):
        # The behaviours from the first start to the last end of the unit's windows are gone through once, block by
        # block.
        targets = units.order_T[units.offset_U[unit] : units.offset_U[unit + 1]]
        first = reach = start_T[targets[0]]
        for slot in range(len(targets)):
            reach = max(reach, end_T[targets[slot]])
            size_Q[slot], worst_Q[slot] = 0, NOTHING
        ahead = first
        for block_begin in range(first, reach, block):
            ahead = max(ahead, block_begin)
            # The first rows of a block, before any target needs them.
            while ahead < min(block_begin + PREFETCHED_ROWS, reach):
                prefetch_row(rows_RD, base + np.int64(ids_M[ahead]) * row_bytes, lines)
                ahead += 1
            for slot in range(len(targets)):
                target = targets[slot]
                start, query = start_T[target], queries + target * dim * 4
                begin, end = max(start, block_begin), min(end_T[target], block_begin + block)
                for behavior in range(begin, end):
                    # The first target of a unit asks for the rows ahead; the others find them in the cache.
                    if ahead < reach and ahead <= behavior + PREFETCHED_ROWS:
                        prefetch_row(rows_RD, base + np.int64(ids_M[ahead]) * row_bytes, lines)
                        ahead += 1
                    row = np.int64(ids_M[behavior])
                    score = dot(rows_RD, base + row * row_bytes, query, dim)
                    if len(scale_R):
                        score *= scale_R[row]
                    score_B[behavior - begin] = score
                if len(parts_P):
                    add_parts(parts_P, target, begin, end, score_B)
                if len(additive_W):
                    pair = first_pair_T[target] - start
                    for behavior in range(begin, end):
                        score_B[behavior - begin] += additive_W[pair + behavior]
                keys_X, size, worst = keys_QX[slot], size_Q[slot], worst_Q[slot]
                for behavior in range(begin, end):
                    key = ordered(score_B[behavior - begin], behavior - start)
                    # Written in any case, and kept only if it is good enough: no branch to mispredict.
                    keys_X[size] = key
                    size += key > worst
                    # Only when the room is full: so the k best are selected once for every k + 32 keys that were good
                    # enough.
                    if size == room:
                        keep_greatest(keys_X, size, k)
                        size, worst = k, keys_X[k - 1]
                size_Q[slot], worst_Q[slot] = size, worst
        for slot in range(len(targets)):
            target, keys_X, size = targets[slot], keys_QX[slot], size_Q[slot]
            # All blocks are done: select once more, sort, and take the keys apart into scores and indices.
            if size > k:
                keep_greatest(keys_X, size, k)
                size = k
            sort_descending(keys_X, spare_X, size)
            for rank in range(size):
                high = np.int32(keys_X[rank] >> 32)
                bits_TK[target, rank] = high if high >= 0 else high ^ _MAGNITUDE
                index_TK[target, rank] = start_T[target] + _LOW - (keys_X[rank] & _LOW)
            for rank in range(size, k):
                bits_TK[target, rank] = _MINUS_INFINITY
                index_TK[target, rank] = -1
