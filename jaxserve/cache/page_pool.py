"""The KV pages of one data shard: which are free, which are in use."""

from collections.abc import Iterable
from typing import NamedTuple


class PageCounts(NamedTuple):
    """How many pages are in which state; free + cached + used == total."""

    free: int
    cached: int
    used: int
    total: int


class PagePool:
    """Hands out page numbers 0 .. num_pages-1 and takes them back.

    The free list is a stack: the page freed last is the first one given out again, so a lightly
    loaded server touches few pages. Every page is free, used or cached (free of users, its
    contents kept for a future prefix hit; none until a prefix index exists).

    Args:
        num_pages: pages in the pool.

    Raises:
        ValueError: `num_pages` is not positive.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"a page pool needs at least one page, got {num_pages}")
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_used = bytearray(num_pages)
        self._num_used = 0

    @property
    def num_total(self) -> int:
        """Pages in the pool."""
        return len(self._is_used)

    @property
    def num_free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages handed out and not yet given back."""
        return self._num_used

    @property
    def num_cached(self) -> int:
        """Pages without a user whose contents are kept for reuse."""
        return 0

    @property
    def num_available(self) -> int:
        """Pages that `allocate` could hand out now: the free ones and the evictable ones."""
        return self.num_free + self.num_cached

    def allocate(self, n: int) -> list[int] | None:
        """Take `n` pages, or None (and no change) if there are not so many.

        Raises:
            ValueError: `n` is negative.
        """
        if n < 0:
            raise ValueError(f"cannot allocate {n} pages")
        first = len(self._free) - n
        if first < 0:
            return None
        pages = self._free[first:]
        del self._free[first:]
        pages.reverse()
        for page in pages:
            self._is_used[page] = 1
        self._num_used += n
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Give pages back.

        Raises:
            ValueError: a page is not in use (freed twice, or never of this pool).
        """
        for page in pages:
            if not 0 <= page < self.num_total or not self._is_used[page]:
                raise ValueError(f"page {page} is not in use")
            self._is_used[page] = 0
            self._num_used -= 1
            self._free.append(page)

    def check(self) -> None:
        """Verify the books; O(pages), for tests.

        Raises:
            AssertionError: a page is lost, free twice, or both free and used.
        """
        free = set(self._free)
        used = {page for page, is_used in enumerate(self._is_used) if is_used}
        assert len(free) == self.num_free, "a page is in the free list twice"
        assert len(used) == self.num_used, f"{len(used)} pages used, {self.num_used} counted"
        assert not free & used, f"pages both free and used: {sorted(free & used)}"
        total = self.num_free + self.num_used + self.num_cached
        assert total == self.num_total, f"{total} pages accounted for, of {self.num_total}"
