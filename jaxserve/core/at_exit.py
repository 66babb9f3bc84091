"""What is closed before the interpreter ends, whether or not its owner remembered to.

Threads inside XLA and compiled code do not know that Python's modules are taken down, and a thread
that comes back from there to an interpreter that is gone ends the process with an abort. So what
keeps a device or such threads busy is closed while everything is still there.
"""

import atexit
import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Protocol

from jaxserve.core.errors import StepHung

log = logging.getLogger(__name__)

EXIT_SECONDS = 60.0  # that what is under way has when the interpreter ends


class ClosesAtExit(Protocol):
    """Something that must not be at work when the interpreter ends."""

    def close_at_exit(self) -> None:
        """Close, and let no other thread begin anew. Called on the main thread, once."""
        ...


class Holdable(Protocol):
    """A lock, as `threading.Lock` and `RLock` make them."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take it; see `threading.Lock`."""
        ...


class _Work:
    """Work of a thread that the interpreter's end must wait for."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


_lock = threading.Lock()
# What there is, and of which process: what was there before a fork has its threads elsewhere.
_open: "weakref.WeakKeyDictionary[ClosesAtExit, int]" = weakref.WeakKeyDictionary()
_works: dict[_Work, int] = {}
_is_ending = False


def close_at_exit(thing: ClosesAtExit) -> None:
    """Close something when the interpreter ends, if it still exists then; the newest first.

    It runs before the exit handlers of modules that are imported by now, such as JAX's, which
    takes the devices down.
    """
    with _lock:
        _open[thing] = os.getpid()
        _register()


@contextlib.contextmanager
def done_before_exit() -> Iterator[None]:
    """Around work, maybe on a daemon thread, for whose end the interpreter's end waits.

    A daemon thread that comes to it after that has begun gets no further.
    """
    work = _Work()
    with work.lock:
        with _lock:
            is_too_late = _is_ending and threading.current_thread().daemon
            if not is_too_late:
                _works[work] = os.getpid()
                _register()
        if is_too_late:
            work.lock.acquire()  # which this thread holds: it waits until the process is gone
        try:
            yield
        finally:
            with _lock:
                _works.pop(work, None)


def hold_at_exit(lock: Holdable, what: str) -> None:
    """Take a lock for good as the interpreter ends, so that whoever needs it gets no further.

    What holds it for longer than `EXIT_SECONDS` would crash in the interpreter's teardown, so then
    the process ends here.

    Args:
        lock: held by what must not be cut off.
        what: names that, for the log.
    """
    if not lock.acquire(timeout=EXIT_SECONDS):
        log.critical("%s hangs: the process ends without closing the engine", what)
        logging.shutdown()
        os._exit(StepHung.exit_status)


def _register() -> None:
    atexit.unregister(_close_all)
    atexit.register(_close_all)


def _close_all() -> None:
    global _is_ending
    _is_ending = True
    while True:
        with _lock:
            works = [work for work, pid in _works.items() if pid == os.getpid()]
            things = [thing for thing, pid in _open.items() if pid == os.getpid()]
            _works.clear()
            if not works:  # else they may still need what is open, and open more
                _open.clear()
        for work in works:
            hold_at_exit(work.lock, "a start")
        if works:
            continue
        if not things:
            return
        for thing in reversed(things):
            try:
                thing.close_at_exit()
            except Exception:
                log.exception("%s could not be closed at the end", type(thing).__name__)
