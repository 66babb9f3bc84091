"""How much of a pattern a growing sequence ends with: Knuth, Morris and Pratt's automaton."""

from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class TailMatcher(Generic[T]):
    """Watches a sequence for a pattern, in constant time per item.

    Args:
        pattern: what is looked for; not empty.

    Attributes:
        matched: how many items of the pattern the sequence ends with, always less than all: a
            complete pattern counts as far as it may begin another.
    """

    def __init__(self, pattern: Sequence[T]) -> None:
        self.matched = 0
        self._pattern = pattern
        self._borders = [0] * len(pattern)  # [i]: longest border of pattern[: i + 1]
        border = 0
        for i in range(1, len(pattern)):
            while border and pattern[i] != pattern[border]:
                border = self._borders[border - 1]
            border += pattern[i] == pattern[border]
            self._borders[i] = border

    def step(self, item: T) -> bool:
        """Take one item; whether the pattern is complete with it."""
        pattern = self._pattern
        matched = self.matched
        while matched and item != pattern[matched]:
            matched = self._borders[matched - 1]
        matched += item == pattern[matched]
        is_complete = matched == len(pattern)
        self.matched = self._borders[-1] if is_complete else matched
        return is_complete

    def reset(self) -> None:
        """Forget the sequence so far."""
        self.matched = 0
