"""The page pool against a dumb oracle: any calls in any order, each result foretold."""

import dataclasses

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from jaxserve.cache.events import EventLog, KvEventKind, Tier
from jaxserve.cache.page_keys import page_key, root_key
from jaxserve.cache.page_pool import PagePool

PAGE_SIZE = 4
Chain = tuple[tuple[int, ...], ...]  # the tokens of each page from the first on; () is the root


def key_of(chain: Chain) -> bytes:
    key = root_key()
    for tokens in chain:
        key = page_key(key, tokens)
    return key


@dataclasses.dataclass
class Page:
    """All that is known of a page; times are the oracle's, later is larger."""

    references: int = 0
    chain: Chain | None = None
    is_tail: bool = False
    is_fresh: bool = False
    freed: int = 0
    published: int = 0
    copyable: int = 0  # since when it may be copied


pages_of_tokens = st.lists(st.integers(0, 1), min_size=PAGE_SIZE, max_size=PAGE_SIZE).map(tuple)
chains = st.lists(pages_of_tokens, max_size=3).map(tuple)
numbers = st.integers(0, 1000)


class PoolMachine(RuleBasedStateMachine):
    @initialize(num_pages=st.integers(1, 12), prefix_cache=st.sampled_from([True, True, False]))
    def start(self, num_pages: int, prefix_cache: bool) -> None:
        log = EventLog()
        self.events = log.subscribe()
        self.told: set[bytes] = set()  # what a router would believe is here
        self.pool = PagePool(num_pages, prefix_cache=prefix_cache, events=log, shard=3)
        self.prefix_cache = prefix_cache
        self.pages = [Page() for _ in range(num_pages)]
        self.stack = list(range(num_pages))  # free pages, the next one first
        self.resting: list[int] = []
        self.evicted: dict[int, Chain] = {}
        self.clock = 0

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def used(self) -> list[int]:
        return [i for i, page in enumerate(self.pages) if page.references]

    def private(self) -> list[int]:
        """Pages that may be published."""
        return [i for i in self.used() if self.pages[i].references == 1 and not self.pages[i].chain]

    def cached(self) -> list[int]:
        """Least recently used first."""
        cached = [i for i, page in enumerate(self.pages) if page.chain and not page.references]
        return sorted(cached, key=lambda i: self.pages[i].freed)

    def holder(self, chain: Chain) -> int | None:
        return next((i for i, page in enumerate(self.pages) if page.chain == chain), None)

    @rule(n=st.integers(0, 5))
    def allocate(self, n: int) -> None:
        expected = self.stack[:n]
        expected += self.cached()[: n - len(expected)]
        pages = self.pool.allocate(n)
        if len(expected) < n:
            assert pages is None
            return
        assert pages is not None and pages == expected
        self.stack = self.stack[n:]
        for i in pages:
            page = self.pages[i]
            if page.chain and not page.is_fresh and not page.is_tail:
                self.evicted.setdefault(i, page.chain)
            self.pages[i] = Page(references=1)

    @precondition(lambda self: self.used())
    @rule(picks=st.lists(numbers, min_size=1, max_size=6))
    def free(self, picks: list[int]) -> None:
        used = [i for i in self.used() for _ in range(self.pages[i].references)]
        order = list(dict.fromkeys(pick % len(used) for pick in picks))
        freed = [used[k] for k in order]
        self.pool.free(freed)
        for i in reversed(freed):
            self.pages[i].references -= 1
            if not self.pages[i].references:
                self.pages[i].freed = self.tick()
                if not self.pages[i].chain:
                    self.stack.insert(0, i)

    @precondition(lambda self: self.used() or self.cached())
    @rule(picks=st.lists(numbers, min_size=1, max_size=4))
    def share(self, picks: list[int]) -> None:
        sharable = self.used() + self.cached()
        pages = [sharable[pick % len(sharable)] for pick in picks]
        self.pool.share(pages)
        for i in pages:
            self.pages[i].references += 1

    @precondition(lambda self: self.private())
    @rule(pick=numbers, parent=chains, tokens=pages_of_tokens)
    def publish(self, pick: int, parent: Chain, tokens: tuple[int, ...]) -> None:
        i = self.private()[pick % len(self.private())]
        chain = (*parent, tokens)
        other = self.holder(chain)
        assert key_of(chain) == page_key(key_of(parent), tokens)
        result = self.pool.publish(i, key_of(chain), key_of(parent), tokens)
        if not self.prefix_cache:
            assert result == i
        elif other is None:
            assert result == i
            now = self.tick()
            self.pages[i] = Page(references=1, chain=chain, is_fresh=True, published=now)
        else:
            assert result == other
            self.pages[other].references += 1
            self.pages[other].is_tail = False
            self.pages[i] = Page()
            self.resting.append(i)

    @precondition(lambda self: self.private())
    @rule(pick=numbers, parent=chains, tokens=pages_of_tokens, length=st.integers(0, PAGE_SIZE))
    def publish_tail(self, pick: int, parent: Chain, tokens: tuple[int, ...], length: int) -> None:
        i = self.private()[pick % len(self.private())]
        tail = tokens[:length]
        self.pool.publish_tail(i, key_of(parent), tail)
        if not tail or not self.prefix_cache:
            return
        chain = (*parent, tail)
        other = self.holder(chain)
        if other is None:
            now = self.tick()
            self.pages[i] = Page(1, chain, is_tail=True, published=now, copyable=now)
        elif not self.pages[other].references:
            self.pages[other].freed = self.tick()

    @rule(chain=chains, last=st.integers(0, PAGE_SIZE))
    def match(self, chain: Chain, last: int) -> None:
        """Also with a key at the end that a tail may have."""
        if chain and last:
            chain = (*chain[:-1], chain[-1][:last])
        expected = []
        for length in range(1, len(chain) + 1):
            i = self.holder(chain[:length])
            if i is None or self.pages[i].is_tail:
                break
            expected.append(i)
        keys = [key_of(chain[:length]) for length in range(1, len(chain) + 1)]
        assert self.pool.match(keys) == expected

    @rule(parent=chains, tokens=st.lists(st.integers(0, 1), max_size=2 * PAGE_SIZE))
    def match_partial(self, parent: Chain, tokens: list[int]) -> None:
        best: tuple[int, int] | None = None
        latest_first = sorted(range(len(self.pages)), key=lambda i: -self.pages[i].copyable)
        alike = [
            (i, chain[-1])
            for i in latest_first
            if (chain := self.pages[i].chain) and self.pages[i].copyable
            if chain[:-1] == parent and list(chain[-1][:1]) == tokens[:1]
        ]
        for i, own in alike[:8]:
            n = max(k for k in range(len(own) + 1) if list(own[:k]) == tokens[:k])
            if n > (best[1] if best else 0):
                best = (i, n)
        assert self.pool.match_partial(key_of(parent), tokens) == best

    @rule()
    def begin_step(self) -> None:
        self.pool.begin_step()
        self.stack = self.resting[::-1] + self.stack
        self.resting = []
        self.evicted = {}
        for page in sorted(self.pages, key=lambda page: page.published):
            if page.is_fresh:
                page.is_fresh = False
                page.copyable = self.tick()

    @rule()
    def take_evicted(self) -> None:
        expected = [(i, key_of(chain)) for i, chain in self.evicted.items()]
        assert self.pool.take_evicted() == expected
        assert self.pool.take_evicted() == []
        self.evicted = {}

    @rule(sure=st.integers(0, 5))
    def clear(self, sure: int) -> None:
        if sure:
            return
        self.stack = self.cached() + self.stack
        self.pool.clear()
        for i, page in enumerate(self.pages):
            self.pages[i] = Page(references=page.references)
        self.evicted = {}

    @rule(refused=st.sampled_from(["free", "share"]), pick=numbers)
    def refuse(self, refused: str, pick: int) -> None:
        """A free page is neither freed again nor shared; the books stay as they were."""
        idle = self.stack + self.resting
        if idle:
            with pytest.raises(ValueError):
                getattr(self.pool, refused)([idle[pick % len(idle)]])

    @invariant()
    def books_agree(self) -> None:
        pool = self.pool
        pool.check()
        cached = self.cached()
        assert pool.num_used == len(self.used())
        assert pool.num_cached == len(cached)
        assert pool.num_free == len(self.stack) + len(self.resting)
        assert pool.num_available == len(self.stack) + len(cached)
        assert pool.num_total == pool.num_free + pool.num_cached + pool.num_used
        held = [(i, key_of(page.chain)) for i, page in enumerate(self.pages) if page.chain]
        kept = pool.cached_pages()
        assert sorted(kept) == [(i, key) for i, key in held if not self.pages[i].is_tail]
        full = [i for i in cached if not self.pages[i].is_tail]
        assert [i for i, _ in kept][len(kept) - len(full) :] == full[::-1]
        if not self.prefix_cache:
            assert not held and not cached

    @invariant()
    def events_tell_the_truth(self) -> None:
        """Every key is announced once when it comes and once when it goes."""
        for event in self.events.read():
            assert (event.tier, event.shard) == (Tier.DEVICE, 3)
            if event.kind is KvEventKind.STORED:
                assert event.key not in self.told
                assert event.key == page_key(event.parent, event.tokens)
                self.told.add(event.key)
            elif event.kind is KvEventKind.REMOVED:
                self.told.remove(event.key)
            else:
                assert event.kind is KvEventKind.CLEARED
                self.told.clear()
        assert self.told == {key_of(page.chain) for page in self.pages if page.chain}


PoolMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=50)
test_any_calls_in_any_order = PoolMachine.TestCase
