"""Waiting for what other threads and processes do, so that a test that hangs fails."""

import time
from collections.abc import Callable

PATIENCE = 20.0  # seconds until a test that hangs fails


def eventually(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Look until it holds.

    Raises:
        AssertionError: it did not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen in {seconds} seconds"
        time.sleep(0.001)
