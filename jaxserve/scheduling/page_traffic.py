"""Pages on the move in a step: saved to the page store, copied, or on their way back."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from jaxserve.core.request import Request
from jaxserve.core.step import LoadDone, PageCopy, PageLoads, PageSave


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


class Load(NamedTuple):
    """Pages that are being filled, and for whom.

    Attributes:
        request: who asked for them; it may have ended since.
        shard: whose pages they are.
        pages: the pages; they are no other request's until the load is done.
        started: when, in seconds.
    """

    request: Request
    shard: int
    pages: list[int]
    started: float


class PageTraffic:
    """Collects what a plan moves, and remembers which loads are under way.

    Args:
        store: where pages go that the device has no room for; None if there is no such place.
    """

    def __init__(self, store: Store | None) -> None:
        self.store = store
        self._tickets = itertools.count()
        self._loads: dict[int, Load] = {}
        self._saves: list[PageSave] = []
        self._copies: list[PageCopy] = []
        self._started: list[PageLoads] = []

    @property
    def num_loads(self) -> int:
        """Loads under way."""
        return len(self._loads)

    def abandoned_pages(self, shard: int) -> list[int]:
        """Pages of a shard that are being filled for requests which have ended since."""
        return [
            page
            for ticket, load in self._loads.items()
            if load.shard == shard and load.request.load_ticket != ticket
            for page in load.pages
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

    def load(
        self, request: Request, shard: int, pages: list[int], keys: Sequence[bytes], now: float
    ) -> None:
        """Start to fill pages for a request, which has no rows until that is done."""
        ticket = next(self._tickets)
        self._loads[ticket] = Load(request, shard, list(pages), now)
        self._started.append(PageLoads(ticket, shard, tuple(pages), tuple(keys)))
        request.load_ticket = ticket

    def abandon(self, request: Request) -> int:
        """The request wants its load no more, whose pages are free only once it is done.

        Returns:
            How many pages.
        """
        assert request.load_ticket is not None
        load = self._loads[request.load_ticket]
        request.load_ticket = None
        return len(load.pages)

    def done(self, done: LoadDone) -> Load:
        """Take note that a load came to an end.

        Raises:
            ValueError: there was no such load.
        """
        if done.ticket not in self._loads:
            raise ValueError(f"no load {done.ticket} is under way")
        return self._loads.pop(done.ticket)

    def take(
        self,
    ) -> tuple[tuple[PageSave, ...], tuple[PageCopy, ...], tuple[PageLoads, ...]]:
        """What to move with this step; the next one starts with nothing."""
        if not (self._saves or self._copies or self._started):
            return (), (), ()
        taken = tuple(self._saves), tuple(self._copies), tuple(self._started)
        self._saves, self._copies, self._started = [], [], []
        return taken
