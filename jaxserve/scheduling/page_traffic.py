"""Pages on the move in a step: saved to the page store, copied, or on their way back."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from jaxserve.core.request import Request
from jaxserve.core.step import FetchDone, PageCopy, PageFetch, PageSave


class Store(Protocol):
    """What the scheduler asks of a `cache.page_store.PageStore`."""

    def match(self, keys: Sequence[bytes]) -> int:
        """How many leading keys are held."""
        ...

    def expect(self, key: bytes) -> bool:
        """Make room for a page that is about to be saved; False if it is not wanted."""
        ...

    def pin(self, keys: Sequence[bytes]) -> None:
        """Keep pages until they are unpinned."""
        ...

    def unpin(self, keys: Sequence[bytes]) -> None:
        """Let pages go again."""
        ...

    def discard(self, keys: Sequence[bytes]) -> None:
        """Forget pages."""
        ...


class Fetch(NamedTuple):
    """Pages that are being filled, and for whom.

    Attributes:
        request: who asked for them; it may have ended since.
        shard: whose pages they are.
        pages: the pages; they are no other request's until the fetch is done.
        started: when, in seconds.
    """

    request: Request
    shard: int
    pages: list[int]
    started: float


class PageTraffic:
    """Collects what a plan moves, and remembers which fetches are under way.

    Args:
        store: where pages go that the device has no room for; None if there is no such place.
    """

    def __init__(self, store: Store | None) -> None:
        self.store = store
        self._tickets = itertools.count()
        self._fetches: dict[int, Fetch] = {}
        self._saves: list[PageSave] = []
        self._copies: list[PageCopy] = []
        self._started: list[PageFetch] = []

    @property
    def num_fetches(self) -> int:
        """Fetches under way."""
        return len(self._fetches)

    def abandoned_pages(self, shard: int) -> list[int]:
        """Pages of a shard that are being filled for requests which have ended since."""
        return [
            page
            for ticket, fetch in self._fetches.items()
            if fetch.shard == shard and fetch.request.fetch_ticket != ticket
            for page in fetch.pages
        ]

    def save(self, shard: int, page: int, key: bytes) -> bool:
        """Save a page before the step overwrites it, if the store wants it.

        Returns:
            Whether it will be saved.
        """
        if self.store is None or not self.store.expect(key):
            return False
        self._saves.append(PageSave(shard, page, key))
        return True

    def copy(self, shard: int, source: int, target: int) -> None:
        """Copy a page on the device, before the step's rows run."""
        self._copies.append(PageCopy(shard, source, target))

    def fetch(
        self, request: Request, shard: int, pages: list[int], keys: Sequence[bytes], now: float
    ) -> None:
        """Start to fill pages for a request, which has no rows until that is done."""
        ticket = next(self._tickets)
        self._fetches[ticket] = Fetch(request, shard, list(pages), now)
        self._started.append(PageFetch(ticket, shard, tuple(pages), tuple(keys)))
        request.fetch_ticket = ticket

    def abandon(self, request: Request) -> int:
        """The request wants its fetch no more, whose pages are free only once it is done.

        Returns:
            How many pages.
        """
        assert request.fetch_ticket is not None
        fetch = self._fetches[request.fetch_ticket]
        request.fetch_ticket = None
        return len(fetch.pages)

    def done(self, done: FetchDone) -> Fetch:
        """Take note that a fetch came to an end.

        Raises:
            ValueError: there was no such fetch.
        """
        if done.ticket not in self._fetches:
            raise ValueError(f"no fetch {done.ticket} is under way")
        return self._fetches.pop(done.ticket)

    def take(
        self,
    ) -> tuple[tuple[PageSave, ...], tuple[PageCopy, ...], tuple[PageFetch, ...]]:
        """What to move with this step; the next one starts with nothing."""
        if not (self._saves or self._copies or self._started):
            return (), (), ()
        taken = tuple(self._saves), tuple(self._copies), tuple(self._started)
        self._saves, self._copies, self._started = [], [], []
        return taken
