"""Raw memory in Numba: what lies at an address, blocks of it, and counters that threads share."""

from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import carray, njit, types  # pyright: ignore[reportPrivateImportUsage]
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

intrinsic: Any = _intrinsic  # what it makes takes one argument less than what it is given
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_VOID, _BYTES = ir.VoidType(), cgutils.voidptr_t
# Where what is fetched is put, as LLVM counts: 3, every cache; 2, all but the first. AMD's Zen 4
# takes a quarter less time for attention and for linear layers if the first one is spared.
_NEAREST_CACHE = 2 if llvm.get_host_cpu_name().startswith("znver") else 3


@intrinsic
def _pointer(_: Any, address: Any) -> Any:
    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], _BYTES)

    return types.voidptr(types.int64), codegen


@njit(forceinline=True)
def words(address: int, count: int) -> np.ndarray:
    """The int64 array at an address."""
    return carray(_pointer(address), count, np.int64)


@njit(forceinline=True)
def ints(address: int, count: int) -> np.ndarray:
    """The int32 array at an address."""
    return carray(_pointer(address), count, np.int32)


@njit(forceinline=True)
def halves(address: int, count: int) -> np.ndarray:
    """The uint16 array at an address: bfloat16, which Numba does not know."""
    return carray(_pointer(address), count, np.uint16)


@njit(forceinline=True)
def octets(address: int, count: int) -> np.ndarray:
    """The int8 array at an address."""
    return carray(_pointer(address), count, np.int8)


@njit(forceinline=True)
def floats(address: int, count: int) -> np.ndarray:
    """The float32 array at an address."""
    return carray(_pointer(address), count, np.float32)


@intrinsic
def allocate(_: Any, size: Any) -> Any:
    """allocate(bytes) -> address of new memory, for `release`."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        function = ir.FunctionType(_BYTES, [_I64])
        malloc = cgutils.get_or_insert_function(builder.module, function, "malloc")
        return builder.ptrtoint(builder.call(malloc, args), _I64)

    return types.int64(types.int64), codegen


@intrinsic
def release(_: Any, address: Any) -> Any:
    """Give back what `allocate` gave, or 0."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        free = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_VOID, [_BYTES]), "free"
        )
        builder.call(free, [builder.inttoptr(args[0], _BYTES)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def _make_block_function(name: str, second: Any) -> Any:
    """An intrinsic of three int64 for Numba that calls C's function of (address, second, bytes).

    It is what `array[:] = other` should be: for that, Numba compiles its strings too, to be able
    to say which shapes do not go together, and takes seconds.
    """
    function = ir.FunctionType(_BYTES, [_BYTES, second, _I64])

    @intrinsic
    def block(_: Any, target: Any, value: Any, size: Any) -> Any:
        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            call = cgutils.get_or_insert_function(builder.module, function, name)
            given = (
                builder.trunc(args[1], second)
                if isinstance(second, ir.IntType)
                else builder.inttoptr(args[1], second)
            )
            builder.call(call, [builder.inttoptr(args[0], _BYTES), given, args[2]])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return block


copy = _make_block_function("memcpy", _BYTES)  # (target, source, bytes)
_fill = _make_block_function("memset", _I32)


@njit(forceinline=True)
def clear(target: int, size: int) -> None:
    """Zeros in `size` bytes from an address on."""
    _fill(target, 0, size)


@intrinsic
def fetch_add(_: Any, address: Any, value: Any) -> Any:
    """fetch_add(address, value): add to an int64, at once for all threads; what it was before."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        counter = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.atomic_rmw("add", counter, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def read(_: Any, address: Any) -> Any:
    """read(address): an int64 that another thread may change."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], _I64.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def replace(_: Any, address: Any, old: Any, new: Any) -> Any:
    """replace(address, old, new): an int64, unless it is not `old`; whether that was done."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        place = builder.inttoptr(args[0], _I64.as_pointer())
        found = builder.cmpxchg(place, args[1], args[2], "seq_cst", "seq_cst")
        return builder.extract_value(found, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


def fetch(builder: Any, address: Any) -> None:
    """Write an instruction that asks for a cache line, which need not be anybody's memory."""
    function = ir.FunctionType(_VOID, [_BYTES, _I32, _I32, _I32])
    call = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")
    read, data = _I32(0), _I32(1)
    builder.call(call, [builder.inttoptr(address, _BYTES), read, _I32(_NEAREST_CACHE), data])


@intrinsic
def call_at(_: Any, address: Any, *arguments: Any) -> Any:
    """call_at(address, ...): call the C function of int64 at an address, which returns one."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        values = cgutils.unpack_tuple(builder, args[1])
        function = ir.FunctionType(_I64, [_I64] * len(values)).as_pointer()
        return builder.call(builder.inttoptr(args[0], function), values)

    given = types.StarArgTuple([types.int64] * len(arguments))
    return types.int64(types.int64, given), codegen
