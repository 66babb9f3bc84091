"""Waiting for what other threads and processes do, so that a test that hangs fails."""

import time
from collections.abc import Callable

PATIENCE = 120.0  # seconds until a test that hangs fails; a machine may have much else to do


def eventually(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Look until it holds.

    Raises:
        AssertionError: it did not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen in {seconds} seconds"
        time.sleep(0.001)
