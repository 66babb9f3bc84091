"""The KV pages of one shard's requests: new ones, shared ones, copies, and those from the store.

Full pages whose tokens are known are published under a key of all tokens before them
(`cache.page_keys`), and from then on only read, so any request that begins with the same tokens
may share them: automatic prefix caching as in vLLM, with the leaf-first eviction of SGLang's
RadixAttention (Zheng et al., 2024). A page that agrees only in part is copied, and computed on
from there.
"""

import os
from typing import NamedTuple

from jaxserve.cache.page_keys import extend_keys, root_key, root_of
from jaxserve.cache.page_pool import PagePool
from jaxserve.core.request import Request
from jaxserve.scheduling.page_traffic import PageTraffic

_PROCESS = os.urandom(8).hex()  # a store outlives processes, and request keys start anew in each
_COPY_FRACTION = 8  # copying a page costs about what computing an eighth of one does


class Found(NamedTuple):
    """What the caches hold of a request's tokens.

    Attributes:
        shared: pages on the device, from the first on.
        stored: keys of the pages after them that the page store holds.
    """

    shared: list[int]
    stored: list[bytes]


class RequestPages:
    """Gives pages to the requests of one shard and takes them back.

    Args:
        shard: the shard's index.
        pool: its pages.
        page_size: tokens per page.
        traffic: what moves pages.
        prefix_cache: whether requests share pages.
    """

    def __init__(
        self, shard: int, pool: PagePool, page_size: int, traffic: PageTraffic, prefix_cache: bool
    ) -> None:
        self.pool = pool
        self._shard = shard
        self._page_size = page_size
        self._traffic = traffic
        self._prefix_cache = prefix_cache
        self._sources: list[int] = []  # that the step being planned copies

    def end_step(self) -> None:
        """The step is planned: save what it evicted, let go of what it copies."""
        for page, key in self.pool.take_evicted():
            self._traffic.save(self._shard, page, key)
        if self._sources:
            self.pool.free(self._sources)
            self._sources = []

    # -- finding and starting -------------------------------------------------------------

    def find(self, request: Request) -> Found:
        """Look up a waiting request's tokens in the caches; takes nothing.

        At least one token is left to compute, since its logits are wanted. All are, if the hidden
        states are wanted, too; but what was swapped out had been computed.
        """
        self.update_keys(request)
        store = self._traffic.store
        if request.wants_hidden:
            swapped = request.swapped_keys
            return Found([], swapped[: store.match(swapped)] if store is not None else [])
        keys = request.page_keys[: (request.num_tokens - 1) // self._page_size]
        shared = self.pool.match(keys)
        rest = (request.swapped_keys or keys)[len(shared) :]
        return Found(shared, rest[: store.match(rest)] if store is not None else [])

    def looks_up(self, request: Request) -> bool:
        """Whether a starting request's tokens may come from what others have computed."""
        return self._prefix_cache and not request.wants_hidden

    def update_keys(self, request: Request) -> None:
        """Name the full pages that the request's known tokens fill, if pages are shared."""
        if not self._prefix_cache:
            return
        named = len(request.page_keys) * self._page_size
        if request.num_known_tokens - named >= self._page_size:
            tokens = request.known_tokens(named, request.num_known_tokens)
            extend_keys(request.page_keys, root_of(request.service), tokens, self._page_size)

    def adopt(self, request: Request, found: Found, now: float) -> None:
        """Give a starting request what was found; its `shared` pages are its own already.

        The caller has made sure that there are pages enough for all its tokens.
        """
        size = self._page_size
        request.page_ids = tuple(found.shared)
        request.num_published_pages = len(found.shared)
        request.num_computed_tokens = len(found.shared) * size
        if found.stored:
            pages = self._allocate(len(found.stored))
            request.page_ids += tuple(pages)
            self._traffic.fetch(request, self._shard, pages, found.stored, now)
        elif self.looks_up(request):
            self._copy_partly(request)

    def _copy_partly(self, request: Request) -> None:
        size, start = self._page_size, request.num_computed_tokens
        end = min(start + size, request.num_tokens - 1)
        if (end - start) * _COPY_FRACTION < size:
            return
        parent = _parent(request, start // size)
        match = self.pool.match_partial(parent, request.known_tokens(start, end))
        if match is None:
            return
        source, num_tokens = match
        # Until the step is planned the source is held, beside all that the request needs.
        missing = -(-request.num_tokens // size) - len(request.page_ids)
        if num_tokens * _COPY_FRACTION < size or self.pool.num_available <= missing:
            return
        self.pool.share([source])
        self._sources.append(source)
        [target] = self._allocate(1)
        self._traffic.copy(self._shard, source, target)
        request.page_ids += (target,)
        request.num_computed_tokens += num_tokens

    def _allocate(self, num_pages: int) -> list[int]:
        pages = self.pool.allocate(num_pages)
        assert pages is not None, "admission counted the pages wrongly"
        return pages

    def finish_fetch(self, request: Request, pages: list[int], num_filled: int) -> None:
        """Take in pages that were fetched; those that could not be filled are computed."""
        size = self._page_size
        start = len(request.page_ids) - len(pages)
        request.page_ids = request.page_ids[: start + num_filled]
        self.pool.free(pages[num_filled:])
        end = (start + num_filled) * size
        if request.swapped_keys:
            end = min(end, request.num_swapped_tokens)
        request.num_computed_tokens = end
        request.fetch_ticket = None
        self.publish(request)

    # -- growing and sharing --------------------------------------------------------------

    def grow(self, request: Request, num_tokens: int) -> int:
        """Give a request pages for its next tokens, for as many of them as there are pages.

        Returns:
            How many of the `num_tokens` tokens now have a place, possibly 0.
        """
        computed, held = request.num_computed_tokens, len(request.page_ids)
        missing = -(-(computed + num_tokens) // self._page_size) - held
        if missing > 0:
            pages = self.pool.allocate(min(missing, self.pool.num_available))
            request.page_ids += tuple(pages or ())
        return min(num_tokens, len(request.page_ids) * self._page_size - computed)

    def publish(self, request: Request) -> None:
        """Let others share the pages that the request fills with tokens whose values are known."""
        if not self._prefix_cache:
            return
        size = self._page_size
        num_full = min(request.num_computed_tokens, request.num_known_tokens) // size
        if num_full <= request.num_published_pages:
            return
        self.update_keys(request)
        keys, pages = request.page_keys, list(request.page_ids)
        for index in range(request.num_published_pages, num_full):
            parent = _parent(request, index)
            tokens = request.known_tokens(index * size, (index + 1) * size)
            pages[index] = self.pool.publish(pages[index], keys[index], parent, tokens)
        request.page_ids = tuple(pages)
        request.num_published_pages = num_full

    # -- giving back ----------------------------------------------------------------------

    def release(self, request: Request) -> None:
        """Take a request's pages; what they hold is kept for others as long as there is room."""
        if request.fetch_ticket is not None:  # being filled: `PageTraffic` has them until then
            num_loading = self._traffic.abandon(request)
            request.page_ids = request.page_ids[: len(request.page_ids) - num_loading]
        if not request.page_ids:
            return
        if self._prefix_cache and request.num_computed_tokens:
            self.publish(request)
            self._publish_tail(request)
        self.pool.free(request.page_ids)
        request.page_ids = ()
        request.num_published_pages = 0

    def _publish_tail(self, request: Request) -> None:
        full = request.num_published_pages
        start = full * self._page_size
        end = min(request.num_computed_tokens, request.num_known_tokens)
        if not start < end < start + self._page_size or full >= len(request.page_ids):
            return
        parent = _parent(request, full)
        self.pool.publish_tail(request.page_ids[full], parent, request.known_tokens(start, end))

    def swap_out(self, request: Request) -> bool:
        """Save all that a running request has computed, to be fetched when it runs again.

        Returns:
            Whether there was room for all of it; if not, what was saved may be dropped any time.
        """
        store = self._traffic.store
        num_pages = -(-request.num_computed_tokens // self._page_size)
        if store is None or not num_pages:
            return False
        self.update_keys(request)
        keys = request.page_keys[: request.num_computed_tokens // self._page_size]
        keys = keys + [_private_key(request, i) for i in range(len(keys), num_pages)]
        for index, key in enumerate(keys):
            held = store.match([key]) or self._traffic.save(
                self._shard, request.page_ids[index], key
            )
            if not held:
                store.unpin(keys[:index])
                return False
            store.pin([key])
        request.swapped_keys, request.num_swapped_tokens = keys, request.num_computed_tokens
        return True

    def drop_swapped(self, request: Request) -> None:
        """Forget what was swapped out: it is back, or not wanted any more."""
        store = self._traffic.store
        if store is not None and request.swapped_keys:
            store.unpin(request.swapped_keys)
            shared = set(request.page_keys)
            store.discard([key for key in request.swapped_keys if key not in shared])
        request.swapped_keys, request.num_swapped_tokens = [], 0


def _parent(request: Request, index: int) -> bytes:
    """The key of the page before a request's page of that number."""
    return request.page_keys[index - 1] if index else root_of(request.service)


def _private_key(request: Request, index: int) -> bytes:
    """What a page is called in the store that holds tokens no other request can ask for."""
    return root_key(f"swap:{_PROCESS}:{request.key}:{request.num_preemptions}:{index}")
