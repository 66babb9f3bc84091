"""Requests that share pages on a device of plain lists: nobody ever reads another's tokens."""

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.cache.events import EventLog, KvEventKind
from jaxserve.cache.page_keys import extend_keys, page_key, root_key
from jaxserve.cache.page_pool import PagePool

PAGE_SIZE = 4


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request: all its tokens (they are known beforehand here) and how far it has come."""

    tokens: list[int]
    root: bytes
    pages: list[int] = dataclasses.field(default_factory=list)
    keys: list[bytes] = dataclasses.field(default_factory=list)  # of the pages published
    computed: int = 0

    def parent(self) -> bytes:
        return self.keys[-1] if self.keys else self.root


class Server:
    """What a scheduler does with a pool, and what a device does with the plan."""

    def __init__(self, seed: int, num_pages: int, prefix_cache: bool) -> None:
        self.random = random.Random(seed)
        log = EventLog()
        self.events = log.subscribe()
        self.parents: dict[bytes, bytes] = {}  # of the keys that are here, as events tell
        self.pool = PagePool(num_pages, prefix_cache=prefix_cache, events=log)
        self.slots: list[list[int | None]] = [[None] * PAGE_SIZE for _ in range(num_pages)]
        self.running: list[Sequence] = []
        self.texts = [[self.random.randrange(3) for _ in range(30)] for _ in range(3)]
        self.contents: dict[bytes, list[int]] = {}  # by key: what a page must hold
        self.cached_tokens = self.copied_tokens = self.num_evicted = self.num_duplicates = 0

    def new_sequence(self) -> Sequence:
        """Texts that begin alike, for two tenants that must not share."""
        head = self.random.choice(self.texts)[: self.random.randrange(1, 20)]
        tail = [self.random.randrange(3) for _ in range(self.random.randrange(1, 8))]
        return Sequence(head + tail, root_key(self.random.choice("ab")))

    def step(self) -> None:
        self.pool.begin_step()
        self.copies: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int, int]] = []
        rows = [row for sequence in list(self.running) if (row := self.grow(sequence))]
        if len(self.running) < 4 and (row := self.admit(self.new_sequence())):
            rows.append(row)
        self.run_device(rows)
        for sequence in list(self.running):
            if sequence.computed == len(sequence.tokens) or self.random.random() < 0.1:
                self.stop(sequence)
        self.check()

    def admit(self, sequence: Sequence) -> tuple[Sequence, list[int]] | None:
        # The last token is computed in any case: something must be sampled after it.
        keys: list[bytes] = []
        extend_keys(keys, sequence.root, sequence.tokens[:-1], PAGE_SIZE)
        shared = self.pool.match(keys)
        self.pool.share(shared)
        sequence.pages, sequence.keys = shared, keys[: len(shared)]
        sequence.computed = len(shared) * PAGE_SIZE
        self.cached_tokens += sequence.computed
        partial = self.pool.match_partial(
            sequence.parent(), sequence.tokens[sequence.computed : -1]
        )
        if partial:
            source, n = partial
            self.pool.share([source])
            pages = self.pool.allocate(1)
            if pages:
                sequence.pages += pages
                sequence.computed += n
                self.copied_tokens += n
                self.copies.append((source, pages[0]))
            self.pool.free([source])
        self.running.append(sequence)
        return self.grow(sequence)

    def grow(self, sequence: Sequence) -> tuple[Sequence, list[int]] | None:
        """Plan some tokens; a sequence that finds no page is preempted for good."""
        end = min(len(sequence.tokens), sequence.computed + self.random.randrange(1, 7))
        missing = -(-end // PAGE_SIZE) - len(sequence.pages)
        if missing > 0:
            pages = self.pool.allocate(missing)
            if pages is None:
                self.stop(sequence)
                return None
            sequence.pages += pages
        for position in range(sequence.computed, end):
            page = sequence.pages[position // PAGE_SIZE]
            self.writes.append((page, position % PAGE_SIZE, sequence.tokens[position]))
        sequence.computed = end
        row = (sequence, list(sequence.pages))
        while len(sequence.keys) < end // PAGE_SIZE:
            self.publish(sequence, len(sequence.keys))
        return row

    def publish(self, sequence: Sequence, index: int) -> None:
        tokens = sequence.tokens[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]
        parent, page = sequence.parent(), sequence.pages[index]
        key = page_key(parent, tokens)
        self.contents[key] = tokens
        sequence.pages[index] = self.pool.publish(page, key, parent, tokens)
        self.num_duplicates += sequence.pages[index] != page
        sequence.keys.append(key)

    def stop(self, sequence: Sequence) -> None:
        """Finished, aborted or preempted: keep what it computed, the started page included."""
        full = len(sequence.keys)
        tail = sequence.tokens[full * PAGE_SIZE : sequence.computed]
        if tail:
            self.pool.publish_tail(sequence.pages[full], sequence.parent(), tail)
            self.contents[page_key(sequence.parent(), tail)] = tail
        self.pool.free(sequence.pages)
        self.running.remove(sequence)

    def run_device(self, rows: list[tuple[Sequence, list[int]]]) -> None:
        """Saves, copies, writes and reads, in the order of a step."""
        for page, key in self.pool.take_evicted():
            assert self.slots[page][: len(self.contents[key])] == self.contents[key]
        for source, target in self.copies:
            self.slots[target] = list(self.slots[source])
        written = [(page, slot) for page, slot, _ in self.writes]
        assert len(set(written)) == len(written), "two rows write the same slot"
        for page, slot, token in self.writes:
            self.slots[page][slot] = token
        for sequence, pages in rows:
            held = [token for page in pages for token in self.slots[page]]
            assert held[: sequence.computed] == sequence.tokens[: sequence.computed]

    def check(self) -> None:
        self.pool.check()
        assert self.pool.num_used == len({p for s in self.running for p in s.pages})
        for event in self.events.read():
            if event.kind is KvEventKind.STORED:
                self.parents[event.key] = event.parent
            else:
                del self.parents[event.key]
                self.num_evicted += 1
        kept = [key for _, key in self.pool.cached_pages()]
        full = {key for key in self.parents if len(self.contents[key]) == PAGE_SIZE}
        assert set(kept) == full
        # No page without the pages before it, at any cut of the list.
        roots = {root_key("a"), root_key("b")}
        for i, key in enumerate(kept):
            parent = self.parents[key]
            assert parent in roots or parent in kept[:i], "a page outlived its parent"


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32), num_pages=st.integers(4, 30), prefix_cache=st.booleans())
def test_everybody_reads_their_own_tokens(seed: int, num_pages: int, prefix_cache: bool) -> None:
    server = Server(seed, num_pages, prefix_cache)
    for _ in range(40):
        server.step()
    if not prefix_cache:
        assert server.cached_tokens == server.copied_tokens == server.num_evicted == 0
        assert server.pool.cached_pages() == []


@pytest.mark.parametrize("seed", range(3))
def test_all_kinds_of_reuse_occur(seed: int) -> None:
    """The test above would show nothing if nothing were shared."""
    server = Server(seed, 20, prefix_cache=True)
    for _ in range(150):
        server.step()
    assert min(server.cached_tokens, server.copied_tokens, server.num_evicted) > 20
    assert server.num_duplicates > 0
