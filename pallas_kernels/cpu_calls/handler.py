"""From three functions to a custom call: XLA's call frame, and its threads.

A call falls into items that any thread may take. The thread that XLA calls on takes them one by
one, and so do helpers from XLA's own pool, if they come in time: nobody waits for one that has not
started, so a busy pool costs speed and never stops anything. A helper that is done waits a moment
for the next call's job (`waiting_room`), and where other programs want the cores, calls do without
helpers (`hiring`). Whoever waits for more than some microseconds is asleep.

The layout of the frame is that of XLA's `ffi/api/c_api.h` (interface 0.3 in JAX 0.10, 0.4 in
0.11, 0.5 in 0.12, alike in all that is read here): structs of 8-byte words, by whose numbers they
are addressed.
"""

import ctypes
import functools
import os
from typing import Any

import jax
import llvmlite.binding as llvm
from numba import cfunc, njit, types

from pallas_kernels.cpu_calls.hiring import STATE_BYTES, look, may_hire, note_alone, note_helped
from pallas_kernels.cpu_calls.memory import (
    allocate,
    call_at,
    fetch_add,
    ints,
    read,
    release,
    words,
)
from pallas_kernels.cpu_calls.waiting_room import hand_over, lasting, make_room, wait_for_job
from pallas_kernels.cpu_calls.waits import cpu_time, now, sleep_while, spin, wake

# Words of XLA_FFI_CallFrame.
_EXTENSION, _API, _CONTEXT, _ARGS, _NUM_RESULTS, _RESULTS = 1, 2, 3, 9, 12, 14
_FRAME_WORDS = 22
# Words of XLA_FFI_Buffer: its type, where the data and where the sizes of its axes are.
_KIND, _DATA, _SIZES = 2, 3, 5
INT8, UINT8, UINT16, FLOAT16, FLOAT32, BFLOAT16 = 2, 6, 7, 10, 11, 16  # XLA_FFI_DataType
_BUFFER_WORDS = 6
# Words of XLA_FFI_Api.
_API_VERSION, _SCHEDULE, _NUM_THREADS = 4, 17, 18
_API_WORDS = 19
_kept: list[Any] = []  # the machine code lives as long as these
# Words of a job.
_REMAINING, _UNFINISHED, _HOLDERS, _FRAME, _MEMORY, _TABLE = range(6)
_JOB_WORDS = 6
_ASLEEP = 1 << 30  # added to what is unfinished: the caller sleeps until that is all
_SPIN = 50_000  # ns before it does
# Words of a call's table: its three functions, `_help_out`, and the waiting room with its slots.
_BEGIN, _DO, _END, _HELPER, _ROOM, _NUM_SLOTS, _STATE = range(7)
_TABLE_WORDS = 7


@njit(forceinline=True)
def operand(frame: int, index: int) -> int:
    """The buffer of a call's operand."""
    return words(words(frame, _FRAME_WORDS)[_ARGS], index + 1)[index]


@njit(forceinline=True)
def result(frame: int, index: int) -> int:
    """The buffer of a call's result."""
    return words(words(frame, _FRAME_WORDS)[_RESULTS], index + 1)[index]


@njit(forceinline=True)
def num_results(frame: int) -> int:
    """How many results a call has."""
    return words(frame, _FRAME_WORDS)[_NUM_RESULTS]


@njit(forceinline=True)
def data(buffer: int) -> int:
    """The address of a buffer's contents."""
    return words(buffer, _BUFFER_WORDS)[_DATA]


@njit(forceinline=True)
def size(buffer: int, axis: int) -> int:
    """The size of one of a buffer's axes."""
    return words(words(buffer, _BUFFER_WORDS)[_SIZES], axis + 1)[axis]


@njit(forceinline=True)
def kind(buffer: int) -> int:
    """The type of a buffer's numbers, as XLA's interface counts them (INT8, ...)."""
    return words(buffer, _BUFFER_WORDS)[_KIND] & 0xFFFFFFFF


@njit(forceinline=True)
def itemsize(buffer: int) -> int:
    """Bytes of a number of float32, bfloat16 or its bits in uint16, int8 or uint8; 0 of others."""
    of = kind(buffer)
    if of in (INT8, UINT8):
        return 1
    return 4 if of == FLOAT32 else 2 if of in (BFLOAT16, UINT16) else 0


@njit(forceinline=True)
def _tell_version(frame: int) -> None:
    """XLA asks for which version of its interface this was made: for the one that asks."""
    frame_words = words(frame, _FRAME_WORDS)
    metadata = words(frame_words[_EXTENSION], 4)[3]
    version = words(frame_words[_API], _API_WORDS)[_API_VERSION]
    words(metadata, 6)[3] = version  # two int32: major, minor
    ints(metadata + 32, 1)[0] = 0  # no traits
    words(metadata, 6)[5] = 0  # no state


@njit
def num_threads(frame: int) -> int:
    """Threads of XLA's pool."""
    frame_words = words(frame, _FRAME_WORDS)
    question = allocate(5 * 8)
    fields = words(question, 5)
    fields[0], fields[1], fields[2], fields[3] = 32, 0, frame_words[_CONTEXT], question + 32
    fields[4] = 1
    call_at(words(frame_words[_API], _API_WORDS)[_NUM_THREADS], question)
    answer = fields[4]
    release(question)
    return answer


@njit
def _schedule(frame: int, task: int, job: int) -> None:
    """Let a thread of XLA's pool call task(job)."""
    frame_words = words(frame, _FRAME_WORDS)
    order = allocate(5 * 8)
    fields = words(order, 5)
    fields[0], fields[1], fields[2], fields[3] = 40, 0, frame_words[_CONTEXT], task
    fields[4] = job
    call_at(words(frame_words[_API], _API_WORDS)[_SCHEDULE], order)
    release(order)


@njit
def _work(job: int) -> int:
    """Take items of a job until there are none; how many."""
    fields = words(job, _JOB_WORDS)
    do = words(fields[_TABLE], _TABLE_WORDS)[_DO]
    done = 0
    while True:
        # Counted down: who comes too late learns it from this number alone.
        item = fetch_add(job + 8 * _REMAINING, -1) - 1
        if item < 0:
            return done
        call_at(do, fields[_FRAME], fields[_MEMORY], item)
        done += 1
        if fetch_add(job + 8 * _UNFINISHED, -1) == _ASLEEP + 1:
            wake(job + 8 * _UNFINISHED)


@njit
def _wait_for_others(job: int) -> None:
    """Until those who took items have done them."""
    place = job + 8 * _UNFINISHED
    if read(place) == 0:
        return
    until = now() + _SPIN
    while now() < until:
        spin()
        if read(place) == 0:
            return
    left = fetch_add(place, _ASLEEP) + _ASLEEP
    while left > _ASLEEP:
        sleep_while(place, left)
        left = read(place)


@njit
def _let_go(job: int) -> None:
    """One holder less; the last one frees the job: a helper may come when all is long done."""
    if fetch_add(job + 8 * _HOLDERS, -1) == 1:
        release(job)


# The three functions that make a custom call, for `make_handler`. As C functions their machine code
# comes from a file (`code_cache`), as does that of what joins them: addresses are in a table.
begins = functools.partial(cfunc, types.int64(types.int64, types.int64), cache=True)
does = functools.partial(cfunc, types.int64(types.int64, types.int64, types.int64), cache=True)
ends = functools.partial(cfunc, types.int64(types.int64, types.int64), cache=True)


@cfunc(types.int64(types.int64), cache=True)
def _help_out(job):  # type: ignore[no-untyped-def]
    """What a thread of XLA's pool does for a job, and for those that come soon after."""
    table = words(words(job, _JOB_WORDS)[_TABLE], _TABLE_WORDS)
    room, num_slots = table[_ROOM], table[_NUM_SLOTS]
    while job:
        _work(job)
        _let_go(job)
        job = wait_for_job(room, num_slots)
    return 0


@cfunc(types.int64(types.int64, types.int64), cache=True)
def _handle(frame, table_at):  # type: ignore[no-untyped-def]
    """A call from XLA."""
    if words(frame, _FRAME_WORDS)[_EXTENSION]:
        _tell_version(frame)
        return 0
    table = words(table_at, _TABLE_WORDS)
    job = allocate(8 * _JOB_WORDS)
    fields = words(job, _JOB_WORDS)
    fields[_MEMORY] = 0
    count = call_at(table[_BEGIN], frame, job + 8 * _MEMORY)
    helpers = 0
    if count > 1 and may_hire(table[_STATE]):
        helpers = min(num_threads(frame), count) - 1
    fields[_REMAINING], fields[_UNFINISHED], fields[_HOLDERS] = count, count, helpers + 1
    fields[_FRAME], fields[_TABLE] = frame, table_at
    for _ in range(hand_over(table[_ROOM], table[_NUM_SLOTS], job, helpers), helpers):
        _schedule(frame, table[_HELPER], job)
    looks = look(table[_STATE]) if count > 1 else 0
    began = now() if looks else 0
    own = _work(job)
    worked = cpu_time() - looks if looks else 0
    if helpers:
        _wait_for_others(job)
    if looks and helpers:
        note_helped(table[_STATE], worked, now() - began, own, count)
    elif looks:
        note_alone(table[_STATE], worked, now() - began)
    call_at(table[_END], frame, fields[_MEMORY])
    release(fields[_MEMORY])
    _let_go(job)
    return 0


@functools.cache
def _waiting_room() -> tuple[int, int, int]:
    """Of all calls of this process: its address, the number of its slots, and `hiring`'s state."""
    num_slots = os.cpu_count() or 1
    return make_room(num_slots), num_slots, lasting(STATE_BYTES)


def make_handler(begin: Any, do: Any, end: Any) -> Any:
    """The C function that XLA calls.

    Args:
        begin: made by `begins()` of a function (frame, place) -> number of items. It may put the
            address of memory at `place`, for the other two; it is freed after the call.
        do: made by `does()` of a function (frame, memory, item) -> 0; items in any order, on any
            thread.
        end: made by `ends()` of a function (frame, memory) -> 0, after all items.

    Returns:
        As `ctypes` has C functions.
    """
    helper: Any = _help_out
    handle: Any = _handle
    table = (ctypes.c_int64 * _TABLE_WORDS)(
        begin.address, do.address, end.address, helper.address, *_waiting_room()
    )
    # Threads that look at it outlive the interpreter: it is never freed.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(table))
    _kept.extend((begin, do, end))
    return _bound(handle.address, ctypes.addressof(table))


def _bound(function: int, argument: int) -> Any:
    """The C function of one int64 that calls another one with a second argument."""
    module = llvm.parse_assembly(f"""
        define i64 @bound(i64 %frame) {{
          %function = inttoptr i64 {function} to ptr
          %result = call i64 %function(i64 %frame, i64 {argument})
          ret i64 %result
        }}
    """)
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    compiler = llvm.create_mcjit_compiler(module, machine)
    compiler.finalize_object()
    _kept.append(compiler)
    signature = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
    return signature(compiler.get_function_address("bound"))


def register(name: str, handler: Any) -> None:
    """Make a custom call known to XLA:CPU, before a program that has it is loaded or run.

    Args:
        name: of the target; once per process.
        handler: what `make_handler` gave.
    """
    _kept.append(handler)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
