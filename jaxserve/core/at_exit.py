"""What is closed before the interpreter ends, whether or not its owner remembered to.

Threads inside XLA and compiled code do not know that Python's modules are taken down, and a thread
that comes back from there to an interpreter that is gone ends the process with an abort. So what
keeps a device or such threads busy is closed while everything is still there.
"""

import atexit
import logging
import os
import threading
import weakref
from typing import Protocol

log = logging.getLogger(__name__)


class ClosesAtExit(Protocol):
    """Something that must not be at work when the interpreter ends."""

    def close_at_exit(self) -> None:
        """Close, and let no other thread begin anew. Called on the main thread, once."""
        ...


_lock = threading.Lock()
_open: "weakref.WeakKeyDictionary[ClosesAtExit, int]" = weakref.WeakKeyDictionary()  # and whose pid


def close_at_exit(thing: ClosesAtExit) -> None:
    """Close something when the interpreter ends, if it still exists then; the newest first.

    It runs before the exit handlers of modules that are imported by now, such as JAX's, which
    takes the devices down.
    """
    with _lock:
        _open[thing] = os.getpid()
        atexit.unregister(_close_all)
        atexit.register(_close_all)


def _close_all() -> None:
    with _lock:
        # Not what a process had that was forked: its threads are not here.
        things = [thing for thing, pid in _open.items() if pid == os.getpid()]
    for thing in reversed(things):
        try:
            thing.close_at_exit()
        except Exception:
            log.exception("%s could not be closed at the end", type(thing).__name__)
