"""Where a helper waits a moment for the next job, instead of going to sleep.

One step is a few hundred calls, microseconds apart, and waking a thread takes longer than some of
them. A job is handed to those who wait; only where there are none is a sleeper woken.
"""

import ctypes
import mmap

from numba import njit

from pallas_kernels.cpu_calls.memory import read, replace
from pallas_kernels.cpu_calls.waits import now, spin

SLOT_BYTES = 64  # a cache line each: who waits reads its own only
_EMPTY, _WAITING = 0, 1  # a slot's word, or else the address of a job
_PATIENCE = 50_000  # ns for which a helper spins


def lasting(size: int) -> int:
    """The address of so many bytes of zeros, aligned to pages; they are never freed.

    Helpers look at them for a moment after the last job, and the threads that they run on outlive
    the interpreter: memory that went with Python's objects would be gone while they look.
    A process that is forked has its own.
    """
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def make_room(num_slots: int) -> int:
    """The address of `num_slots` empty slots, in `lasting` memory."""
    return lasting(num_slots * SLOT_BYTES)


@njit(cache=True)
def wait_for_job(room: int, num_slots: int) -> int:
    """A job that `hand_over` gave, which is now the caller's to do; 0 if none came in time."""
    for slot in range(room, room + num_slots * SLOT_BYTES, SLOT_BYTES):
        if replace(slot, _EMPTY, _WAITING):
            until = now() + _PATIENCE
            while read(slot) == _WAITING and now() < until:
                spin()
            if replace(slot, _WAITING, _EMPTY):
                return 0
            job = read(slot)
            replace(slot, job, _EMPTY)
            return job
    return 0


@njit(cache=True)
def hand_over(room: int, num_slots: int, job: int, wanted: int) -> int:
    """Give a job to at most `wanted` helpers who wait; to how many."""
    given = 0
    for slot in range(room, room + num_slots * SLOT_BYTES, SLOT_BYTES):
        if given == wanted:
            break
        if read(slot) == _WAITING and replace(slot, _WAITING, job):
            given += 1
    return given
