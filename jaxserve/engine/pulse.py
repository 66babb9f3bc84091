"""How long the engine's thread takes for its turns, told to other threads."""

import contextlib
import time
from collections.abc import Iterator


class Pulse:
    """Counts the turns of one thread.

    Attributes:
        longest: seconds of the longest turn that has ended.
        turn: number of the turn under way; None between turns.
    """

    def __init__(self) -> None:
        self.longest = 0.0
        self.turn: int | None = None
        self._num_turns = 0

    @contextlib.contextmanager
    def beat(self) -> Iterator[None]:
        """Around a turn."""
        self._num_turns += 1
        self.turn = self._num_turns
        began = time.perf_counter()
        try:
            yield
        finally:
            self.longest = max(self.longest, time.perf_counter() - began)
            self.turn = None
