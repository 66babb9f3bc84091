"""How many tokens a step may compute: a fixed number, or what keeps it within a time."""

import bisect
from collections.abc import Sequence
from typing import Protocol

_WEIGHT = 0.2  # of a new measurement in the running mean
_LEAST_CHUNK = 8  # tokens of prompts that a step may compute however slow it is
_OUTLIER = 4.0  # a step that took so many times the mean was held up by something else


class TokenBudget(Protocol):
    """Says how large the next step may be."""

    def tokens(self, num_running: int) -> int:
        """Tokens of the next step, over all shards, when so many requests run."""
        ...

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        ...


class FixedBudget:
    """One number for every step: Sarathi-Serve's token budget (Agrawal et al., OSDI 2024).

    Args:
        max_tokens: of one step.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens

    def tokens(self, num_running: int) -> int:
        """The fixed number."""
        return self._max_tokens

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Nothing is learned."""


class TpotBudget:
    """As many tokens as steps within a target time have been able to hold.

    Decodes get a token per step, so a step's time is their time per output token. Step times are
    kept as a running mean per padded size. The budget grows from below, one size at a time: what
    a size not seen yet will cost lies on the line through the two largest that were.

    Args:
        target: seconds per step.
        sizes: the token counts that steps are padded to, over all shards, ascending; the last
            is the largest budget.
    """

    def __init__(self, target: float, sizes: Sequence[int]) -> None:
        self._target = target
        self._sizes = tuple(sizes)
        self._seconds: dict[int, float] = {}

    def tokens(self, num_running: int) -> int:
        """The largest size whose steps are expected to meet the target.

        A target that cannot be met is no reason to stand still: every running request gets its
        token, and prompts a few.
        """
        best = self._sizes[0]
        largest_seen = max(self._seconds, default=0)
        for size in self._sizes:
            is_seen = size in self._seconds
            if not is_seen and size < largest_seen:
                continue
            if self._expected(size) > self._target:
                break
            best = size
            if not is_seen:
                break  # try this one before any larger
        return min(max(best, num_running + _LEAST_CHUNK), self._sizes[-1])

    def _expected(self, size: int) -> float:
        """Seconds of a step, of a size seen or of a larger one than any seen."""
        if not self._seconds or size in self._seconds:
            return self._seconds.get(size, 0.0)
        *smaller, last = sorted(self._seconds)
        slope = self._seconds[last] / last
        if smaller:
            before = smaller[-1]
            slope = max((self._seconds[last] - self._seconds[before]) / (last - before), 0.0)
        return self._seconds[last] + slope * (size - last)

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
