"""The stream of KV page events: which pages came to be held in which tier, and which went.

A router that follows it knows what every instance could serve from its cache. The events are
those of vLLM (`vllm/distributed/kv_events.py`: BlockStored, BlockRemoved, AllBlocksCleared),
with the tier as its `medium` and the data shard as its data parallel rank.
"""

import enum
import threading
from collections.abc import Sequence
from typing import NamedTuple, Self


class Tier(enum.StrEnum):
    """Where a page is held."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


class KvEventKind(enum.StrEnum):
    """What happened."""

    STORED = "stored"
    REMOVED = "removed"
    CLEARED = "cleared"  # all pages of the tier (and shard) at once
    LOST = "lost"  # the reader fell behind: events are missing here, it must start anew


class KvEvent(NamedTuple):
    """One change of what is held.

    Attributes:
        number: one more than the previous event's of the same log; for LOST, the number of the
            last event that is missing.
        kind: what happened.
        tier: where; None for LOST, which concerns all.
        key: of the page, as in `cache/page_keys.py`; empty unless STORED or REMOVED.
        parent, tokens: of a page STORED: what its key is made of. Fewer tokens than a page has
            slots make a tail, which is only ever copied.
        shard: index on the mesh's data axis; 0 for tiers that all shards have in common.
    """

    number: int
    kind: KvEventKind
    tier: Tier | None
    key: bytes = b""
    parent: bytes = b""
    tokens: tuple[int, ...] = ()
    shard: int = 0


class EventLog:
    """Takes events from any thread and hands them to subscribers.

    Without a subscriber an event costs one look at an empty tuple: it is neither built nor
    numbered. So a subscriber knows nothing of the time before; what is held when it comes must
    be asked of the pool (`PagePool.cached_pages`) and the store, after subscribing. Events apply
    to that answer whether or not it has them in it already: they only add and remove keys.

    Args:
        capacity: events that are kept for a subscriber that does not read.

    Raises:
        ValueError: `capacity` is not positive.
    """

    def __init__(self, capacity: int = 65536) -> None:
        if capacity < 1:
            raise ValueError(f"an event log needs room for at least one event, got {capacity}")
        self._capacity = capacity
        self._lock = threading.Lock()
        self._subscriptions: tuple[Subscription, ...] = ()  # replaced, never changed
        self._number = 0

    def stored(
        self, key: bytes, parent: bytes, tokens: Sequence[int], tier: Tier, shard: int = 0
    ) -> None:
        """A page of `tokens` after `parent` is held in `tier` from now on."""
        if self._subscriptions:
            self._add(KvEventKind.STORED, tier, key, parent, tuple(tokens), shard)

    def removed(self, key: bytes, tier: Tier, shard: int = 0) -> None:
        """A page is no longer held in `tier`."""
        if self._subscriptions:
            self._add(KvEventKind.REMOVED, tier, key, b"", (), shard)

    def cleared(self, tier: Tier, shard: int = 0) -> None:
        """All pages of `tier` (of that shard) are gone."""
        if self._subscriptions:
            self._add(KvEventKind.CLEARED, tier, b"", b"", (), shard)

    def subscribe(self) -> "Subscription":
        """Get all events from now on; close it when done."""
        subscription = Subscription(self)
        with self._lock:
            self._subscriptions += (subscription,)
        return subscription

    def _add(
        self,
        kind: KvEventKind,
        tier: Tier,
        key: bytes,
        parent: bytes,
        tokens: tuple[int, ...],
        shard: int,
    ) -> None:
        with self._lock:
            event = KvEvent(self._number, kind, tier, key, parent, tokens, shard)
            self._number += 1
            for subscription in self._subscriptions:
                unread = subscription._unread
                if len(unread) >= self._capacity:
                    # Half a story is worth nothing: with any event missing all must be asked anew.
                    unread[:] = [KvEvent(event.number, KvEventKind.LOST, None)]
                else:
                    unread.append(event)

    def _take(self, subscription: "Subscription") -> list[KvEvent]:
        with self._lock:
            unread, subscription._unread = subscription._unread, []
        return unread

    def _drop(self, subscription: "Subscription") -> None:
        with self._lock:
            self._subscriptions = tuple(s for s in self._subscriptions if s is not subscription)
            subscription._unread = []


class Subscription:
    """One reader's place in an `EventLog`; a context manager that closes itself."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._unread: list[KvEvent] = []  # guarded by the log's lock

    def read(self) -> list[KvEvent]:
        """The events since the last call, oldest first; does not wait.

        A first event of kind LOST says that this reader was too slow: it must forget all it
        knows and ask what is held, as if it had subscribed now; the rest of the list goes on
        from there.
        """
        return self._log._take(self)

    def close(self) -> None:
        """Get no more events. Idempotent."""
        self._log._drop(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
