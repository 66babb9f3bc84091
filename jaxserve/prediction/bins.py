"""Distributions over lengths, as shares of bins that grow by a factor of the square root of two.

Lengths spread over orders of magnitude, and what matters of a remaining length is its size
relative to others; equal bins, as S3 and TRAIL have them, resolve the short ones badly.
"""

import functools
import math

import numpy as np

GROWTH = math.sqrt(2)


class LengthBins:
    """Bins 1, 2, 3, 4..5, 6..7, 8..10, ... up to the longest possible answer.

    Bin i holds the lengths l with edges[i] <= l < edges[i + 1].

    Args:
        max_tokens: the longest possible answer; longer lengths count into the last bin.

    Attributes:
        edges: float64 [bins + 1].
    """

    def __init__(self, max_tokens: int) -> None:
        edges, power = [1], 1.0
        while edges[-1] <= max_tokens:
            power *= GROWTH
            if round(power) > edges[-1]:
                edges.append(round(power))
        self.edges = np.array(edges, np.float64)

    def __len__(self) -> int:
        return len(self.edges) - 1

    def index(self, lengths: np.ndarray) -> np.ndarray:
        """The bins of lengths: int32, the same shape."""
        found = np.searchsorted(self.edges, lengths, side="right") - 1
        return np.clip(found, 0, len(self) - 1).astype(np.int32)

    def quantile(self, shares: np.ndarray, share: float = 0.5) -> np.ndarray:
        """The length below which `share` of each distribution lies, as if bins were uniform.

        Args:
            shares: float [rows, bins], each row adds up to one.
            share: in (0, 1); a half gives the median, which has the least absolute error.

        Returns:
            float64 [rows].
        """
        sums = np.cumsum(shares, axis=1)
        at = np.minimum((sums < share).sum(axis=1), len(self) - 1)
        rows = np.arange(len(shares))
        inside = shares[rows, at]
        below = sums[rows, at] - inside
        part = np.clip((share - below) / np.maximum(inside, 1e-9), 0, 1)
        # Lengths are whole: bin 2..2 means 2, and not 2 to 3.
        return self.edges[at] + part * (self.edges[at + 1] - 1 - self.edges[at])

    def lognormal(self, median: float, sigma: float) -> np.ndarray:
        """The distribution whose logarithm is normal around that of `median`: float64 [bins]."""
        scaled = (np.log(self.edges[1:-1]) - math.log(median)) / (sigma * math.sqrt(2))
        below = [0.0, *(0.5 * (1 + math.erf(x)) for x in scaled), 1.0]
        return np.diff(below)

    @functools.cache  # noqa: B019 - as many entries as steps between two probes
    def advance(self, tokens: int) -> np.ndarray:
        """What becomes of remaining lengths after so many tokens more.

        Returns:
            float64 [bins, bins]; times a distribution it gives the shares of those that go on,
            which add up to less than one.
        """
        low, high = self.edges[:-1], self.edges[1:]
        start = np.maximum((low - tokens)[None, :], low[:, None])
        end = np.minimum((high - tokens)[None, :], high[:, None])
        return np.maximum(end - start, 0) / (high - low)[None, :]
