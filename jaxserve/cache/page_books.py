"""The page store's books: which page is in which tier, expected, pinned, or in transfer."""

from collections import Counter
from collections.abc import Iterable, Sequence

from jaxserve.cache.events import EventLog, Tier
from jaxserve.cache.slot_table import SlotTable

# How far saving to disk keeps ahead of eviction: this part of host memory's slots, but no more
# pages than that. So a new page's slot is there at once, unless pages come faster than disk takes.
_MARGIN_PART, _MARGIN_PAGES = 8, 64


class PageBooks:
    """All states of all pages of a `PageStore`, and every change between them.

    No contents, lock or thread: what copies a page calls a `begin_` method, copies without
    the store's lock, and then calls the `end_` method. In between the page is in transfer, and
    the slots that it is about are not given to another. New pages go to host memory, or to disk
    if there is none.

    Args:
        host, disk: slots of the two tiers; one of them may have none.
        events: see `PageStore`.

    Attributes:
        held: keys that are in a tier or expected, and not about to be dropped. For reading only.
        expected: key -> slot taken for a page that is announced.
        in_transfer: whether a page is being fetched, filled or promoted.
    """

    def __init__(self, host: SlotTable, disk: SlotTable, events: EventLog | None) -> None:
        self.held = set(disk.keys())
        self.expected: dict[bytes, int] = {}
        self._host, self._disk, self._events = host, disk, events
        self._slots = {Tier.HOST: host, Tier.DISK: disk}
        self._first_tier = Tier.HOST if host.num_slots else Tier.DISK
        self._margin = max(1, min(host.num_slots // _MARGIN_PART, _MARGIN_PAGES))
        self._pins: Counter[bytes] = Counter()
        self._filling: set[bytes] = set()  # expected ones whose contents are being copied
        self._users: Counter[bytes] = Counter()  # how many fetches are about each key
        self._promoting: set[bytes] = set()  # from a fetch's output to host memory
        self._demoting: set[bytes] = set()  # from host memory to disk
        self._unsaved: set[bytes] = set()  # in host memory, not yet offered to the disk
        self._doomed: set[bytes] = set()  # to be dropped when their transfers have ended
        self._to_erase: list[int] = []  # taken disk slots whose headers must go
        self._num_erasing = 0
        for key in self.held:
            self._note_stored(key, Tier.DISK)

    @property
    def in_transfer(self) -> bool:
        """Whether a page is being fetched, filled or promoted."""
        return bool(self._users or self._filling or self._promoting)

    @property
    def num_pinned(self) -> int:
        """Keys that are pinned."""
        return len(self._pins)

    @property
    def has_work(self) -> bool:
        """Whether the writer should look for something to do."""
        return bool(self._to_erase or (self._unsaved and self._host.num_free < self._margin))

    # Announced pages

    def expect(self, key: bytes) -> bool:
        """Reserve a slot for a page that is about to be saved; whether there was one to give."""
        if key in self.held or key in self._doomed:
            self._touch(key)
            return False
        slot = self._take_slot(self._first_tier)
        if slot is None:
            return False
        self.expected[key] = slot
        self.held.add(key)
        return True

    def begin_fill(self, key: bytes) -> int | None:
        """The slot for an expected page's contents; None if it is not expected (any more)."""
        if key not in self.expected or key in self._filling:
            return None
        self._filling.add(key)
        return self.expected[key]

    def end_fill(self, key: bytes, is_stored: bool) -> None:
        """The expected page has come, or never will."""
        slot = self.expected.pop(key)
        self._filling.discard(key)
        if is_stored:
            self._hold(slot, key, self._first_tier)
            if self._first_tier is Tier.HOST and self._disk.num_slots:
                self._unsaved.add(key)
        else:
            self.held.discard(key)
            self._give_back(slot, self._first_tier)
        self._settle(key)

    # Which pages stay

    def pin(self, keys: Iterable[bytes]) -> None:
        """Keep pages from being evicted, until as many calls of `unpin`."""
        for key in keys:
            self._pins[key] += 1
            self._host.pin(key)
            self._disk.pin(key)

    def unpin(self, keys: Iterable[bytes]) -> None:
        """Take back one `pin` of each page.

        Raises:
            ValueError: a page is not pinned.
        """
        for key in keys:
            if key not in self._pins:
                raise ValueError(f"page {key.hex()} is not pinned")
            self._pins[key] -= 1
            if not self._pins[key]:
                del self._pins[key]
                self._host.unpin(key)
                self._disk.unpin(key)

    def drop(self, key: bytes) -> None:
        """Forget a page, once no copy of it is under way; from now on it is not held any more."""
        if key in self.expected and key not in self._filling:
            self.end_fill(key, is_stored=False)
        elif key in self.held:
            self._doomed.add(key)
            self.held.discard(key)
            self._settle(key)

    def cancel_expected(self) -> None:
        """No more pages are expected, but those that are being filled."""
        for key in self.expected.keys() - self._filling:
            self.end_fill(key, is_stored=False)

    # Fetches

    def begin_fetch(self, keys: Sequence[bytes]) -> list[bytes]:
        """The leading keys that are held; none of them is evicted until `end_fetch`."""
        wanted = []
        for key in keys:
            if key not in self.held:
                break
            wanted.append(key)
            self._users[key] += 1
            self._touch(key)
        return wanted

    def end_fetch(self, wanted: Sequence[bytes]) -> None:
        """A reader is done with what `begin_fetch` returned."""
        for key in wanted:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
                self._settle(key)

    def find(self, key: bytes) -> tuple[int | None, int | None]:
        """Where a page's contents are: its slots in host memory and on disk."""
        if key in self._doomed:
            return None, None
        return self._host.get(key), self._disk.get(key)

    def begin_promotion(self, key: bytes) -> int | None:
        """A slot of host memory for a page of the disk that is being fetched; None for none."""
        if key in self._doomed or key in self._promoting or key in self._host:
            return None
        slot = self._take_slot(Tier.HOST)
        if slot is not None:
            self._promoting.add(key)
        return slot

    def end_promotion(self, key: bytes, slot: int) -> None:
        """The page's contents are in the slot."""
        self._promoting.discard(key)
        self._hold(slot, key, Tier.HOST)
        self._settle(key)

    # The writer's work

    def next_to_save(self) -> bytes | None:
        """The page of host memory to write next, if too few could be evicted at once."""
        num_needed = self._margin - self._host.num_free
        for key in self._host.oldest_first(max(0, num_needed)):
            if key in self._unsaved:
                return key
        return None

    def to_flush(self) -> list[bytes]:
        """What is only in host memory, of too much the most recently used, oldest first."""
        only_here = [key for key in self._host.keys() if key not in self._disk]  # noqa: SIM118
        return only_here[max(0, len(only_here) - self._disk.num_slots) :]

    def is_demoting(self, key: bytes) -> bool:
        """Whether a page is being written to disk."""
        return key in self._demoting

    def begin_demotion(self, key: bytes) -> tuple[int, int] | None:
        """From which slot of host memory to which on disk a page is to be written, if it is.

        Offered once: a page that the disk overwrites later, or has no slot for, is of less use
        than all that is there, and the next pages would only take turns.
        """
        source = self._host.get(key)
        if source is None or key in self._demoting or key in self._doomed:
            return None
        self._unsaved.discard(key)
        target = None if key in self._disk else self._take_slot(Tier.DISK)
        if target is None:
            return None
        self._demoting.add(key)
        return source, target

    def end_demotion(self, key: bytes, slot: int, is_written: bool) -> None:
        """The page is on disk in `slot`, or could not be written."""
        self._demoting.discard(key)
        if is_written:
            self._hold(slot, key, Tier.DISK)
        else:
            self._give_back(slot, Tier.DISK)
        self._settle(key)

    @property
    def is_erasing(self) -> bool:
        """Whether a header is being erased."""
        return self._num_erasing > 0

    def begin_erasure(self) -> int | None:
        """A disk slot whose header must be erased before it is free."""
        if not self._to_erase:
            return None
        self._num_erasing += 1
        return self._to_erase.pop()

    def end_erasure(self, slot: int) -> None:
        """The slot is free."""
        self._num_erasing -= 1
        self._disk.give_back(slot)

    def check(self) -> None:
        """Verify the books; O(pages), for tests.

        Raises:
            AssertionError: a slot is lost or owned twice, a pinned page could be evicted, or
                `held` is not what there is.
        """
        num_taken = {
            Tier.HOST: len(self._promoting),
            Tier.DISK: len(self._demoting) + len(self._to_erase) + self._num_erasing,
        }
        num_taken[self._first_tier] += len(self.expected)
        for tier, slots in self._slots.items():
            slots.check(num_taken[tier], set(self._pins))
        counts = (*self._pins.values(), *self._users.values())
        assert all(count > 0 for count in counts), "a pin or a fetch without an owner"
        on_host = set(self._host.keys())
        assert self._unsaved <= on_host, "a page to save that is not here"
        assert self._filling <= self.expected.keys(), "contents for an unexpected page"
        there = on_host.union(self._disk.keys(), self.expected)
        assert self.held == there - self._doomed, "what is held is not what there is"
        moving = set(self._users).union(self._demoting, self._filling, self._promoting)
        assert self._doomed <= moving, "a dropped page is still there"

    def _take_slot(self, tier: Tier) -> int | None:
        """A slot for a new page: a free one, or that of the page to evict, if it can be now."""
        slots = self._slots[tier]
        slot = slots.take()
        if slot is None and tier is Tier.DISK and self._to_erase:
            slot = self._to_erase.pop()  # overwriting does as well
        if slot is not None:
            return slot
        key = slots.oldest()
        if key is None or key in self._users or key in self._demoting:
            return None
        if tier is Tier.HOST and key in self._unsaved:
            return None  # the writer has yet to come to it
        return self._evict(key, tier)

    def _evict(self, key: bytes, tier: Tier) -> int:
        """A tier loses a page; the slot is the caller's."""
        slot = self._slots[tier].drop(key)
        if tier is Tier.HOST:
            self._unsaved.discard(key)
        if key not in self._host and key not in self._disk:
            self.held.discard(key)
        if self._events:
            self._events.removed(key, tier)
        return slot

    def _hold(self, slot: int, key: bytes, tier: Tier) -> None:
        self._slots[tier].hold(slot, key, pinned=key in self._pins)
        self._note_stored(key, tier)

    def _give_back(self, slot: int, tier: Tier) -> None:
        """A taken slot has no page: it is free, on disk once its old header is erased."""
        if tier is Tier.HOST:
            self._host.give_back(slot)
        else:
            self._to_erase.append(slot)

    def _settle(self, key: bytes) -> None:
        """A transfer of this page has ended: if that was the last, drop it if it is doomed."""
        transfers = (self._users, self._demoting, self._filling, self._promoting)
        if key in self._doomed and not any(key in keys for keys in transfers):
            self._doomed.discard(key)
            for tier, slots in self._slots.items():
                if key in slots:
                    self._give_back(self._evict(key, tier), tier)

    def _touch(self, key: bytes) -> None:
        self._host.touch(key)
        self._disk.touch(key)

    def _note_stored(self, key: bytes, tier: Tier) -> None:
        if self._events:
            self._events.stored(key, b"", (), tier)
