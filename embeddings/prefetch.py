"""Asks a CPU's memory for what a compiled loop reads next; called from compiled loops."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

_I32 = ir.IntType(32)


def _prefetch(locality: int) -> Any:
    @intrinsic
    def ask(_: Any, address: Any) -> tuple[Any, Callable[..., ir.Value]]:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
            # The arguments of LLVM's prefetch: address, read or write, locality (0 = none, 3 = keep), data or
            # instructions.
            kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(), _I32, _I32, _I32])
            prefetch = get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            read, data = _I32(0), _I32(1)
            builder.call(prefetch, [builder.inttoptr(arguments[0], ir.PointerType()), read, _I32(locality), data])
            return context.get_dummy_value()

        return types.void(types.int64), generate

    return ask


# Each takes an address, at which there need not be anything, and goes on before the cache line is there.
past_second_level, into_second_level = _prefetch(0), _prefetch(2)
