"""The KV pages of one data shard: which are free, which in use, which kept for their contents."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from jaxserve.cache.events import EventLog, Tier
from jaxserve.cache.page_keys import page_key
from jaxserve.cache.page_map import PageMap, make_page_map
from jaxserve.cache.prefix_index import PrefixIndex


class PageCounts(NamedTuple):
    """How many pages are in which state; free + cached + used == total."""

    free: int
    cached: int
    used: int
    total: int


class PagePool:
    """Hands out page numbers 0 .. num_pages-1, shares them, takes them back and remembers them.

    Every page is in one of three states::

        free --allocate--> used --free, with a key--> cached --share--> used
          ^                 |                            |
          +--free, no key---+      evicted by allocate---+--> used

    A page gets its key (see `cache/page_keys.py`) by `publish`; from then on it is not written
    and every request whose tokens lead to the same key may share it. This is automatic prefix
    caching with reference counts (PagedAttention: Kwon et al., SOSP 2023; hashed pages as in
    vLLM), evicted least recently used first and, of one request, from the last page to the
    first, so that no page goes before the pages that can only be found behind it.

    The free list is a stack: the page freed last is the first one given out again, so a lightly
    loaded server touches few pages. Cached pages are touched only when no free one is left.

    Args:
        num_pages: pages in the pool.
        prefix_cache: whether pages are kept for their contents at all.
        events: told of every key that comes and goes.
        shard: this pool's index on the mesh's data axis, for the events.

    Raises:
        ValueError: `num_pages` is not positive.
    """

    def __init__(
        self,
        num_pages: int,
        *,
        prefix_cache: bool = True,
        events: EventLog | None = None,
        shard: int = 0,
    ) -> None:
        if num_pages < 1:
            raise ValueError(f"a page pool needs at least one page, got {num_pages}")
        self._prefix_cache = prefix_cache
        self._events = events or EventLog()
        self._shard = shard
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._resting: list[int] = []  # free, but not before the next step; see `publish`
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._index = PrefixIndex(num_pages)
        # Published in this step: not written yet when the step's saves and copies run.
        self._fresh: dict[int, None] = {}
        self._evicted: dict[int, bytes] = {}

    @property
    def num_total(self) -> int:
        """Pages in the pool."""
        return len(self._references)

    @property
    def num_free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free) + len(self._resting)

    @property
    def num_used(self) -> int:
        """Pages with at least one reference."""
        return self.num_total - self.num_free - len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages without a reference whose contents are kept for reuse."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` could hand out now."""
        return len(self._free) + len(self._cached)

    def page_map(self, max_bins: int) -> PageMap:
        """Where the used and cached pages lie; for any thread, see `make_page_map`."""
        return make_page_map(self._references, self._cached, max_bins)

    def begin_step(self) -> None:
        """A new step is being planned: all that was planned before will be done before it.

        So what was published may be copied, the pages given up as duplicates may be handed out,
        and what was evicted without a copy being asked for is forgotten: it will be overwritten.
        """
        if self._resting:
            self._free += self._resting
            self._resting.clear()
        if self._fresh:
            for page in self._fresh:
                self._index.link(page)
            self._fresh.clear()
        if self._evicted:
            self._evicted = {}

    # Pages come and go.

    def allocate(self, n: int) -> list[int] | None:
        """Take `n` pages with one reference each, or None (and no change) if there are not so many.

        Free ones go first, then the cached ones that were not used for longest; these lose their
        contents (see `take_evicted`).

        Raises:
            ValueError: `n` is negative.
        """
        if n < 0:
            raise ValueError(f"cannot allocate {n} pages")
        free = self._free
        missing = n - len(free)
        if missing > len(self._cached):
            return None
        if missing > 0:
            pages = free[::-1]
            free.clear()
            pages += self._evict(missing)
        elif n == 1:
            pages = [free.pop()]
        else:
            pages = free[-n:][::-1] if n else []
            del free[len(free) - n :]
        for page in pages:
            self._references[page] = 1
        return pages

    def _evict(self, n: int) -> list[int]:
        pages = []
        for _ in range(n):
            page, _ = self._cached.popitem(last=False)
            key = self._index.remove(page)
            # Saves read what was there when the step began: the first key, if there are two.
            if page not in self._fresh and not self._index.is_tail[page]:
                self._evicted.setdefault(page, key)
            self._events.removed(key, Tier.DEVICE, self._shard)
            pages.append(page)
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Give up one reference to each of some pages, a request's in the order of its tokens.

        A page without references left is cached if it has a key, else free. The pages are taken
        from the last to the first, so that they will be evicted in that order.

        Raises:
            ValueError: a page is not in use (freed too often, or never of this pool).
        """
        references, key_of = self._references, self._index.key_of
        total = len(references)
        for page in reversed(pages):
            if not 0 <= page < total or not references[page]:
                raise ValueError(f"page {page} is not in use")
            references[page] -= 1
            if references[page]:
                continue
            if key_of[page] is None:
                self._free.append(page)
            else:
                self._cached[page] = None

    def share(self, pages: Sequence[int]) -> None:
        """Take one more reference to each of some pages that are used or cached.

        Raises:
            ValueError: a page is free (or never of this pool).
        """
        references, cached = self._references, self._cached
        total = len(references)
        for page in pages:
            if not 0 <= page < total:
                raise ValueError(f"page {page} is not of this pool")
            if not references[page]:
                if page not in cached:
                    raise ValueError(f"page {page} is free, there is nothing to share")
                del cached[page]
            references[page] += 1

    # Pages are found by what they hold.

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The full pages, used or cached, of the longest run of leading keys that are all here.

        Takes no references: `share` the pages before anything is allocated.
        """
        return self._index.match(keys)

    def match_partial(self, parent: bytes, tokens: Sequence[int]) -> tuple[int, int] | None:
        """A page that begins like some tokens: for copying its start, never for sharing.

        Pages published since `begin_step` are left out: a step copies before it writes.

        Args:
            parent: key of the page before (or of the root).
            tokens: what should come after it.

        Returns:
            The page and how many of its leading tokens equal `tokens`, at least one: the most
            of those among a few that are looked at. None if no page begins so. Takes no
            reference: `share` the page until the copy is planned.
        """
        return self._index.match_partial(parent, tokens)

    def publish(self, page: int, key: bytes, parent: bytes, tokens: Sequence[int]) -> int:
        """Let others share a full page, and keep it when it is freed.

        If another page has the key already, the caller's reference moves to that one and `page`
        becomes free; so equal contents are held once. A row that was planned in this step may
        still write `page`, so it is not handed out before `begin_step`.

        Args:
            page: used, with one reference and without a key. Holds, or will hold before any
                later step, `tokens`, and is never written again.
            key: page_key(parent, tokens).
            parent: key of the page before (or of the root).
            tokens: what the page holds.

        Returns:
            The page that the caller has its reference to now: `page`, or the other one.

        Raises:
            ValueError: `page` is not as it must be, or there are no tokens.
        """
        if not self._prefix_cache:
            return page
        self._refuse_unless_private(page)
        if not len(tokens):
            raise ValueError(f"page {page} is published without tokens")
        other = self._index.find(key)
        if other is None:
            self._add(page, key, parent, tokens, is_tail=False)
            self._fresh[page] = None
            return page
        self._index.make_full(other)
        self.share((other,))
        self._references[page] = 0
        self._resting.append(page)
        return other

    def publish_tail(self, page: int, parent: bytes, tokens: Sequence[int]) -> None:
        """Keep a page that is not full when it is freed, for its start to be copied.

        If a page with the same tokens is here already, that one now counts as just used, and
        `page` will be free like any other. Without tokens nothing happens.

        Args:
            page: used, with one reference and without a key. Its first slots hold `tokens`, or
                will when the steps planned so far are done, and they are not written again.
            parent: key of the page before (or of the root).
            tokens: what the first slots hold.

        Raises:
            ValueError: `page` is not as it must be.
        """
        if not self._prefix_cache or not len(tokens):
            return
        self._refuse_unless_private(page)
        key = page_key(parent, tokens)
        other = self._index.find(key)
        if other is None:
            self._add(page, key, parent, tokens, is_tail=True)
            self._index.link(page)
        elif other in self._cached:
            self._cached.move_to_end(other)

    def _refuse_unless_private(self, page: int) -> None:
        if not 0 <= page < self.num_total or self._references[page] != 1:
            raise ValueError(f"page {page} does not have exactly one reference")
        if self._index.key_of[page] is not None:
            raise ValueError(f"page {page} has been published already")

    def _add(
        self, page: int, key: bytes, parent: bytes, tokens: Sequence[int], *, is_tail: bool
    ) -> None:
        self._index.add(page, key, parent, tokens, is_tail=is_tail)
        self._events.stored(key, parent, tokens, Tier.DEVICE, self._shard)

    # Pages are forgotten, or kept elsewhere.

    def take_evicted(self) -> list[tuple[int, bytes]]:
        """Pages (and their keys) that `allocate` evicted since the last call or `begin_step`.

        Their contents are there until the step being planned runs. Each page comes once. Tails do
        not come, since none could ask for them by key, nor do pages that were published in this
        very step: they hold nothing yet.
        """
        if not self._evicted:
            return []
        evicted, self._evicted = self._evicted, {}
        return list(evicted.items())

    def cached_pages(self) -> list[tuple[int, bytes]]:
        """All full pages with a key, used ones included, the latest used first, and their keys.

        Of two pages of one request the earlier comes first: any leading part of the list can be
        found again.
        """
        is_tail = self._index.is_tail
        full = [(page, key) for key, page in self._index.items() if not is_tail[page]]
        used = [(page, key) for page, key in full if self._references[page]]
        key_of = dict(full)
        return used + [(page, key_of[page]) for page in reversed(self._cached) if page in key_of]

    def clear(self) -> None:
        """Forget all contents: cached pages become free, used ones lose their keys.

        For when no page is worth its key any more. What a running request publishes afterwards
        is found only once the pages before it are there again.
        """
        self._index = PrefixIndex(self.num_total)
        self._free += reversed(self._cached)
        self._cached.clear()
        self._fresh.clear()
        self._evicted = {}
        self._events.cleared(Tier.DEVICE, self._shard)

    def check(self) -> None:
        """Verify the books; O(pages), for tests.

        Raises:
            AssertionError: a page is lost, in two states, or kept without a key.
        """
        self._index.check()
        free = set(self._free) | set(self._resting)
        used = {page for page, count in enumerate(self._references) if count}
        key_of = self._index.key_of
        assert len(free) == self.num_free, "a page is free twice"
        assert not free & used, f"pages both free and used: {sorted(free & used)}"
        assert not free & self._cached.keys(), "a page is both free and cached"
        assert not used & self._cached.keys(), "a page is both used and cached"
        total = len(free) + len(used) + len(self._cached)
        assert total == self.num_total, f"{total} pages accounted for, of {self.num_total}"
        assert all(key_of[page] is not None for page in self._cached), "cached without a key"
        assert all(key_of[page] is None for page in free), "a free page has a key"
        assert self._prefix_cache or not len(self._index), "a page has a key, against orders"
