"""A histogram that takes many equal values at once."""

import math
from bisect import bisect_left
from collections.abc import Sequence

from prometheus_client.utils import floatToGoString


class Histogram:
    """Counts values by upper bounds (inclusive), as Prometheus does.

    Not `prometheus_client.Histogram`, which takes values one by one under a lock: all tokens of a
    step have one of very few latencies, and are counted here in one go.

    Args:
        bounds: upper bounds of the buckets, ascending; infinity is added.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    @property
    def count(self) -> int:
        """Values counted."""
        return sum(self._counts)

    def observe(self, value: float, count: int = 1) -> None:
        """Count a value so many times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self.sum += value * count

    def buckets(self) -> list[tuple[str, float]]:
        """Values up to each bound, by the bound as Prometheus writes it; infinity last."""
        result, total = [], 0
        for bound, count in zip((*self._bounds, math.inf), self._counts, strict=True):
            total += count
            result.append((floatToGoString(bound), float(total)))
        return result

    def copy(self) -> "Histogram":
        """One of its own with the same counts."""
        other = Histogram(self._bounds)
        other._counts = self._counts.copy()
        other.sum = self.sum
        return other
