"""The page store in numbers."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TierStats:
    """One tier in numbers.

    Attributes:
        num_pages: pages held (a page may be in both tiers).
        num_bytes: their size.
        max_pages: pages that there is room for.
        hits: pages that `fetch` found here; host memory is asked first.
        misses: pages that it did not find here, or not intact.
    """

    num_pages: int
    num_bytes: int
    max_pages: int
    hits: int
    misses: int


@dataclasses.dataclass(frozen=True)
class StoreStats:
    """The page store in numbers.

    Attributes:
        host, disk: per tier; no pages and no room in a tier that is not there.
        pinned_pages: keys that are pinned.
        corrupt_pages: pages that were damaged on disk, found out when read, and dropped.
        failed_writes: pages that could not be written to disk.
    """

    host: TierStats
    disk: TierStats
    pinned_pages: int
    corrupt_pages: int
    failed_writes: int
