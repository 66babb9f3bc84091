"""Custom calls on CPUs whose helpers come late, never, or stop half-way."""

import contextlib
import ctypes
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import njit

from pallas_kernels.cpu_calls import handler, hiring, waiting_room
from pallas_kernels.cpu_calls.code_cache import code_cache
from pallas_kernels.cpu_calls.handler import begins, does, ends, make_handler
from pallas_kernels.cpu_calls.hiring import may_hire, note_alone, note_helped
from pallas_kernels.cpu_calls.memory import fetch_add, read, words
from pallas_kernels.cpu_calls.waits import cpu_time, now, sleep_while, spin, wake
from tests.pallas_kernels.fake_xla import FakeXla

# Words of the argument of calls: items, a gate that the second item to begin waits at until it is
# 0, how many began, and from _DONE on how often each item was done.
_ITEMS, _GATE, _BEGUN, _DONE = range(4)
MS = 10**6  # in ns
PATIENT = 60  # seconds, by which a thread that is still there hangs


def make_call() -> Any:
    @begins()
    def _begin(frame, place):  # type: ignore[no-untyped-def]
        return words(words(frame, 22)[handler._CONTEXT], 1)[0]

    @does()
    def _do(frame, memory, item):  # type: ignore[no-untyped-def]
        argument = words(frame, 22)[handler._CONTEXT]
        if fetch_add(argument + 16, 1) == 1:
            while read(argument + 8):
                spin()
        fetch_add(argument + 24 + 8 * item, 1)
        return 0

    @ends()
    def _end(frame, memory):  # type: ignore[no-untyped-def]
        return 0

    return make_handler(_begin, _do, _end)


@pytest.fixture(scope="module")
def handle() -> Any:
    with code_cache():
        return make_call()


@pytest.fixture(autouse=True)
def state() -> Iterator[Any]:
    """What calls know together, as in a new process; left like that, too."""
    _, _, at = handler._waiting_room()
    fields = (ctypes.c_int64 * hiring._STATE_WORDS).from_address(at)
    fields[:] = [0] * len(fields)
    yield fields
    fields[:] = [0] * len(fields)


def argument(items: int, gate: int = 0) -> Any:
    fields = (ctypes.c_int64 * (_DONE + items))()
    fields[_ITEMS], fields[_GATE] = items, gate
    return fields


def in_thread(run: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENT
    while not condition():
        assert time.monotonic() < end, "hangs"
        time.sleep(0.001)


def test_helpers_that_never_come_are_not_waited_for(handle: Any):
    xla, given = FakeXla(num_threads=4), argument(9)
    xla.call(handle, ctypes.addressof(given))
    assert len(xla.tasks) == 3 and given[_DONE:] == [1] * 9
    for task in xla.tasks:  # when all is long done
        task()
    assert given[_DONE:] == [1] * 9


@pytest.mark.parametrize(("threads", "items"), [(1, 5), (4, 1), (4, 0)])
def test_calls_without_anybody_to_share_with(threads: int, items: int, handle: Any):
    xla, given = FakeXla(num_threads=threads), argument(items)
    xla.call(handle, ctypes.addressof(given))
    assert not xla.tasks and given[_DONE:] == [1] * items


def test_a_helper_that_stops_in_an_item_is_waited_for_asleep(handle: Any):
    """The caller does all others meanwhile, sleeps, and is woken by the last item's end."""
    xla, given = FakeXla(num_threads=2), argument(7, gate=1)
    given[_BEGUN] = 1  # so that the first item to begin is the one that stops: the helper's
    helpers = []

    def schedule(order: int) -> int:
        _, _, _, task, job = (ctypes.c_int64 * 5).from_address(order)
        run = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(task)
        xla.jobs.append(job)
        helpers.append(in_thread(lambda: run(job)))
        until(lambda: given[_BEGUN] > 1)
        return 0

    xla._schedule = schedule  # type: ignore[method-assign]
    xla.__post_init__()
    caller = in_thread(lambda: xla.call(handle, ctypes.addressof(given)))
    until(lambda: bool(xla.jobs))
    left = ctypes.c_int64.from_address(xla.jobs[0] + 8 * handler._UNFINISHED)
    until(lambda: left.value == handler._ASLEEP + 1)
    assert sorted(given[_DONE:]) == [0] + 6 * [1] and caller.is_alive()
    given[_GATE] = 0
    for thread in (caller, *helpers):
        thread.join(PATIENT)
        assert not thread.is_alive()
    assert given[_DONE:] == [1] * 7


def test_a_helper_that_a_fork_left_behind_in_the_waiting_room_is_not_waited_for(handle: Any):
    """In a forked process the slots say that threads wait which are not there."""
    room, num_slots, _ = handler._waiting_room()
    slots = [
        ctypes.c_int64.from_address(room + i * waiting_room.SLOT_BYTES) for i in range(num_slots)
    ]

    def check() -> None:
        for slot in slots:
            slot.value = waiting_room._WAITING
        xla = FakeXla(num_threads=num_slots + 1)
        for items in (9, 5, 9):
            given = argument(items)
            xla.call(handle, ctypes.addressof(given))
            assert given[_DONE:] == [1] * items

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX's of forks, which the child has no use for
        child = os.fork()
    if child == 0:
        status = 1
        try:
            check()
            status = 0
        finally:
            os._exit(status)
    until(lambda: os.waitpid(child, os.WNOHANG)[0] == child)


def test_calls_do_without_helpers_while_these_cost_more_than_they_save(handle: Any, state: Any):
    at = ctypes.addressof(state)
    assert may_hire(at)
    begun = time.monotonic_ns()
    for _ in range(50):  # of 4 ms, 2 were lost, and helpers took a third of the items
        note_helped(at, 2 * MS, 4 * MS, 4, 6)
    longest = state[hiring._PAUSE]
    assert longest == hiring._LONGEST and state[hiring._RESUME] > begun + longest
    state[hiring._RESUME] = begun + 10**13
    xla, given = FakeXla(num_threads=4), argument(6)
    xla.call(handle, ctypes.addressof(given))
    assert not xla.tasks and given[_DONE:] == [1] * 6
    state[hiring._RESUME] = begun  # the pause is over: they are tried again
    xla.call(handle, ctypes.addressof(given))
    assert len(xla.tasks) == 3
    for _ in range(40):  # now they took half of the items, and less was lost
        note_helped(at, 7 * MS // 2, 4 * MS, 3, 6)
    assert state[hiring._PAUSE] < longest and state[hiring._RESUME] == 0
    for task in xla.tasks:
        task()


def test_what_calls_lose_without_helpers_is_not_held_against_these(state: Any):
    at = ctypes.addressof(state)
    for lost, hires in ((MS, True), (0, False)):
        state[:] = [0] * len(state)
        for _ in range(20):
            note_alone(at, 4 * MS - lost, 4 * MS)
            note_helped(at, 3 * MS, 4 * MS, 3, 6)
        assert (state[hiring._RESUME] == 0) == hires


def test_some_calls_with_helpers_are_looked_at(handle: Any, state: Any):
    xla, given = FakeXla(num_threads=2), argument(500)
    for _ in range(hiring._EVERY):
        xla.call(handle, ctypes.addressof(given))
    assert state[hiring._CALLS] == hiring._EVERY and state[hiring._TOOK] > 0
    for task in xla.tasks:
        task()


@njit(nogil=True)
def _turns(address, mine, count, pauses):  # type: ignore[no-untyped-def]
    """Count a word up, whenever it is even or odd, asleep while it is not."""
    for turn in range(count):
        for _ in range(pauses[turn]):
            spin()
        value = read(address)
        while value % 2 != mine:
            sleep_while(address, value)
            value = read(address)
        fetch_add(address, 1)
        wake(address)


def test_no_wake_up_is_lost():
    count, word = 3000, np.zeros(1, np.int64)
    pauses = np.random.default_rng(0).integers(0, 60, (2, count))
    threads = [
        in_thread(lambda mine=mine: _turns(word.ctypes.data, mine, count, pauses[mine]))
        for mine in (0, 1)
    ]
    for thread in threads:
        thread.join(PATIENT)
        assert not thread.is_alive(), f"asleep at {word[0]} of {2 * count}"
    assert word[0] == 2 * count


@njit
def _clocks():  # type: ignore[no-untyped-def]
    return now(), cpu_time()


def test_clocks():
    before = time.monotonic_ns(), time.thread_time_ns()
    mine = _clocks()
    after = time.monotonic_ns(), time.thread_time_ns()
    assert before[0] <= mine[0] <= after[0] and before[1] <= mine[1] <= after[1]


@pytest.mark.skipif(sys.platform != "linux", reason="has /proc")
def test_helpers_starved_on_one_core():
    """All threads of XLA's on one core, and several callers; then everywhere again."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.linear import cpu

    call = jax.jit(lambda x, weight: cpu.linear(x, weight, "float", None))
    random = np.random.default_rng(0)
    x = random.standard_normal((3, 40), np.float32)
    weight = random.standard_normal((1200, 40), np.float32)
    expected = x @ weight.T
    call(x, weight).block_until_ready()

    def check() -> None:
        for _ in range(40):
            np.testing.assert_allclose(call(jnp.asarray(x), weight), expected, atol=1e-4)

    threads = [int(path.name) for path in Path("/proc/self/task").iterdir()]
    before = os.sched_getaffinity(0)
    failures: list[BaseException] = []

    def caller() -> None:
        try:
            check()
        except BaseException as error:
            failures.append(error)

    def run_on(cores: set[int]) -> None:
        for thread in threads:
            with contextlib.suppress(ProcessLookupError):  # other tests' threads come to their end
                os.sched_setaffinity(thread, cores)

    try:
        run_on({min(before)})
        callers = [in_thread(caller) for _ in range(3)]
        for thread in callers:
            thread.join(PATIENT)
            assert not thread.is_alive()
    finally:
        run_on(before)
    assert not failures
