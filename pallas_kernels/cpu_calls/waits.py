"""How threads wait in Numba: a moment of spinning, then asleep, and by which clock."""

import platform
import sys
import time
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from pallas_kernels.cpu_calls.memory import intrinsic

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_VOID, _BYTES = ir.VoidType(), cgutils.voidptr_t
_TIMESPEC = ir.LiteralStructType([_I64, _I64])  # seconds, nanoseconds
_MACHINE = platform.machine().lower()
# The number of the system call; None: not Linux, or unknown, and a sleeper looks now and then.
_FUTEX = (
    {"x86_64": 202, "aarch64": 98, "riscv64": 98}.get(_MACHINE) if sys.platform == "linux" else None
)
_WAIT_PRIVATE, _WAKE_PRIVATE = 128, 129  # FUTEX_WAIT, FUTEX_WAKE; only this process looks
_NAP = 20_000  # ns


def _pause(builder: Any) -> None:
    """Tell the core that this is a spinning loop, where LLVM has a word for that."""
    if _MACHINE in ("x86_64", "amd64"):
        function, args = ir.FunctionType(_VOID, []), []
        name = "llvm.x86.sse2.pause"
    elif _MACHINE in ("aarch64", "arm64"):
        function, args = ir.FunctionType(_VOID, [_I32]), [_I32(1)]  # YIELD
        name = "llvm.aarch64.hint"
    else:
        return
    builder.call(cgutils.get_or_insert_function(builder.module, function, name), args)


def _clock(number: int, doc: str) -> Any:
    def clock(_: Any) -> Any:
        def codegen(_context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
            function = ir.FunctionType(_I32, [_I32, _TIMESPEC.as_pointer()])
            ask = cgutils.get_or_insert_function(builder.module, function, "clock_gettime")
            place = cgutils.alloca_once(builder, _TIMESPEC)
            builder.call(ask, [_I32(number), place])
            seconds = builder.load(cgutils.gep_inbounds(builder, place, 0, 0))
            rest = builder.load(cgutils.gep_inbounds(builder, place, 0, 1))
            return builder.add(builder.mul(seconds, _I64(10**9)), rest)

        return types.int64(), codegen

    clock.__doc__ = doc
    return intrinsic(clock)


now = _clock(time.CLOCK_MONOTONIC, "Nanoseconds on a clock that never goes back.")
cpu_time = _clock(time.CLOCK_THREAD_CPUTIME_ID, "Nanoseconds for which this thread had a core.")


@intrinsic
def spin(_: Any) -> Any:
    """One turn of a loop that waits for another thread for microseconds."""

    def codegen(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        _pause(builder)
        return context.get_dummy_value()

    return types.void(), codegen


def _futex(builder: Any, address: Any, operation: int, value: Any) -> None:
    """The system call, with no time-out."""
    function = ir.FunctionType(_I64, [_I64], var_arg=True)
    syscall = cgutils.get_or_insert_function(builder.module, function, "syscall")
    nothing = _I64(0)
    builder.call(
        syscall, [_I64(_FUTEX), address, _I64(operation), value, nothing, nothing, nothing]
    )


@intrinsic
def sleep_while(_: Any, address: Any, value: Any) -> Any:
    """sleep_while(address, value): until `wake`, if the int64 at an address is `value`.

    Its lower half is looked at. It may also return without any reason.
    """

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if _FUTEX is None:
            place = cgutils.alloca_once_value(builder, ir.Constant(_TIMESPEC, [0, _NAP]))
            function = ir.FunctionType(_I32, [_BYTES, _BYTES])
            nap = cgutils.get_or_insert_function(builder.module, function, "nanosleep")
            builder.call(nap, [builder.bitcast(place, _BYTES), _BYTES(None)])
        else:
            _futex(builder, args[0], _WAIT_PRIVATE, args[1])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def wake(_: Any, address: Any) -> Any:
    """wake(address): who sleeps since the int64 at an address did not change looks again."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if _FUTEX is not None:
            everyone = _I64(2**31 - 1)
            _futex(builder, args[0], _WAKE_PRIVATE, everyone)
        return context.get_dummy_value()

    return types.void(types.int64), codegen
