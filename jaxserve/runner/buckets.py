"""The few shapes that steps are padded to, so that every program is known before serving."""

import bisect
import dataclasses
from collections.abc import Sequence

SECOND_BUCKET = 8  # a step of 2 tokens costs nearly what one of 8 does; a program costs seconds


def doubling_buckets(largest: int) -> tuple[int, ...]:
    """1, 8, 16, 32, ... up to and including `largest`."""
    sizes, size = [1], SECOND_BUCKET
    while size < largest:
        sizes.append(size)
        size *= 2
    return (*sizes, largest) if largest > 1 else (1,)


def pick(buckets: Sequence[int], size: int) -> int:
    """The smallest bucket that holds `size`.

    Raises:
        ValueError: even the largest bucket is too small; the scheduler broke its budget.
    """
    index = bisect.bisect_left(buckets, size)
    if index == len(buckets):
        raise ValueError(f"{size} exceeds the largest bucket, {buckets[-1]}")
    return buckets[index]


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Shapes of one data shard's part of a step.

    Attributes:
        tokens: query tokens per shard; one backbone program each.
        sampled: rows that sample per shard; one sampler program each.
        max_rows: rows per shard at most (a step of t tokens has min(t, max_rows) of them).
        max_pages: width of the page table.
    """

    tokens: tuple[int, ...]
    sampled: tuple[int, ...]
    max_rows: int
    max_pages: int

    @classmethod
    def for_limits(
        cls, *, max_tokens: int, max_rows: int, max_model_len: int, page_size: int
    ) -> "Buckets":
        """Doubling buckets up to a shard's limits."""
        return cls(
            tokens=doubling_buckets(max_tokens),
            sampled=doubling_buckets(max_rows),
            max_rows=max_rows,
            max_pages=-(-max_model_len // page_size),
        )

    def rows(self, tokens: int) -> int:
        """Rows of a step in the bucket of `tokens` tokens: every row brings at least one."""
        return min(tokens, self.max_rows)
