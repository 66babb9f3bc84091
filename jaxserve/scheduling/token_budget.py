"""How many tokens a step may compute: a fixed number, or what keeps it within a time."""

import bisect
from collections.abc import Sequence
from typing import Protocol

_WEIGHT = 0.2  # of a new measurement in the running mean
_OUTLIER = 4.0  # a step that took so many times the mean was held up by something else


class TokenBudget(Protocol):
    """Says how large the next step may be."""

    def tokens(self) -> int:
        """Tokens of the next step, over all shards."""
        ...

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        ...


class FixedBudget:
    """The same for every step: Sarathi-Serve's token budget (Agrawal et al., OSDI 2024).

    Args:
        max_tokens: of one step.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens

    def tokens(self) -> int:
        """The fixed number."""
        return self._max_tokens

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Nothing is learned."""


class TpotBudget:
    """As many tokens as steps within a target time have been able to hold.

    Decodes get a token per step, so a step's time is their time per output token. Step times are
    kept as a running mean per padded size. A size not seen yet is taken to cost in proportion
    to the next smaller one that was, which is too much (a step has fixed costs), so the budget
    grows from below, one size at a time.

    Args:
        target: seconds per step.
        sizes: the token counts that steps are padded to, over all shards, ascending; the last
            is the largest budget.
    """

    def __init__(self, target: float, sizes: Sequence[int]) -> None:
        self._target = target
        self._sizes = tuple(sizes)
        self._seconds: dict[int, float] = {}

    def tokens(self) -> int:
        """The largest size whose steps are expected to meet the target, at least the smallest."""
        best = self._sizes[0]
        known_size, known_seconds = 0, 0.0
        for size in self._sizes:
            if size in self._seconds:
                known_size, known_seconds = size, self._seconds[size]
            expected = known_seconds * size / known_size if known_size else 0.0
            if expected > self._target:
                break
            best = size
            if size not in self._seconds:
                break  # try this one before any larger
        return best

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Take a step's time into its size's running mean."""
        index = bisect.bisect_left(self._sizes, num_tokens)
        if index == len(self._sizes):
            return
        size = self._sizes[index]
        mean = self._seconds.get(size)
        if mean is None:
            self._seconds[size] = seconds
        elif seconds < _OUTLIER * mean:
            self._seconds[size] = mean + _WEIGHT * (seconds - mean)
