"""The books of a tier with room for so many pages: which slots are free, and who holds the rest."""

import itertools
from collections import OrderedDict


class SlotTable:
    """Numbered slots: free, taken (by a transfer, for no key yet) or held under a key.

    Keys that are not pinned stand in the order of their last use, so that finding the one to
    evict is O(1) however many are pinned. Not thread-safe: the page store's lock guards it.

    Args:
        num_slots: how many there are; may be 0.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        # A stack: a tier that is hardly used touches little memory.
        self._free = list(range(num_slots - 1, -1, -1))
        self._slots: dict[bytes, int] = {}
        self._evictable: OrderedDict[bytes, None] = OrderedDict()  # least recently used first

    def __contains__(self, key: bytes) -> bool:
        return key in self._slots

    @property
    def num_free(self) -> int:
        """Slots that hold no page."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        """Slots that a key holds."""
        return len(self._slots)

    def get(self, key: bytes) -> int | None:
        """The slot that `key` holds."""
        return self._slots.get(key)

    def take(self) -> int | None:
        """A free slot, to be given back or held; None if there is none."""
        return self._free.pop() if self._free else None

    def give_back(self, slot: int) -> None:
        """A taken slot is free again."""
        self._free.append(slot)

    def hold(self, slot: int, key: bytes, *, pinned: bool) -> None:
        """A taken slot is `key`'s from now on, and was used just now."""
        assert key not in self._slots, "a key holds one slot at most"
        self._slots[key] = slot
        if not pinned:
            self._evictable[key] = None

    def drop(self, key: bytes) -> int:
        """Take the slot of `key` away from it; it is taken, not free."""
        self._evictable.pop(key, None)
        return self._slots.pop(key)

    def touch(self, key: bytes) -> None:
        """`key` was used just now, if it is here."""
        if key in self._evictable:
            self._evictable.move_to_end(key)

    def pin(self, key: bytes) -> None:
        """`key`, if it is here, is not for eviction."""
        self._evictable.pop(key, None)

    def unpin(self, key: bytes) -> None:
        """`key`, if it is here, may be evicted; it counts as used just now."""
        if key in self._slots:
            self._evictable[key] = None

    def oldest(self) -> bytes | None:
        """The key to evict first."""
        return next(iter(self._evictable), None)

    def oldest_first(self, n: int | None = None) -> list[bytes]:
        """The first `n` keys to evict, or all, in that order."""
        return list(itertools.islice(self._evictable, n))

    def keys(self) -> list[bytes]:
        """All keys that hold a slot: those to evict in that order, then the pinned ones."""
        pinned = [key for key in self._slots if key not in self._evictable]
        return [*self._evictable, *pinned]

    def check(self, num_taken: int, pinned: set[bytes]) -> None:
        """Verify the books; O(slots), for tests.

        Args:
            num_taken: slots that ought to be taken now.
            pinned: keys that ought not to be evictable.

        Raises:
            AssertionError: a slot is lost or has two owners, or a pinned key could be evicted.
        """
        slots = [*self._free, *self._slots.values()]
        assert len(set(slots)) == len(slots), "a slot has two owners"
        assert set(slots) <= set(range(self.num_slots)), "a slot that does not exist"
        total = len(slots) + num_taken
        assert total == self.num_slots, f"{total} slots accounted for, of {self.num_slots}"
        evictable = self._slots.keys() - pinned
        assert self._evictable.keys() == evictable, "pinned keys could be evicted, or others not"
