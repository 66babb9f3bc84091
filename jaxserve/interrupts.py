"""Ctrl-C that waits for the end of a step: an engine whose step was cut serves no more."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """Around what should not be cut by Ctrl-C: KeyboardInterrupt is raised at its end.

    A second Ctrl-C does cut it. Only where Ctrl-C does what it does by default: in the main
    thread, and where no other handler stands in (as in a notebook's cell).
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    waits = False

    def wait(_number: int, _frame: object) -> None:
        nonlocal waits
        waits = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if waits:
        raise KeyboardInterrupt
