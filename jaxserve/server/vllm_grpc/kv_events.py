"""The engine's KV page events as the batches that prefix-aware gateways follow."""

import time
from collections.abc import Iterable, Iterator, Sequence

from smg_grpc_proto.generated import common_pb2 as pb

from jaxserve.cache.events import KvEvent, KvEventKind, Tier

MAX_EVENTS_PER_BATCH = 1000  # a client takes messages of 4 MiB by default

_Place = tuple[Tier | None, int]  # tier and shard

_LEVELS = {Tier.DEVICE: 0, Tier.HOST: 1, Tier.DISK: 2}
_TIERS = {
    Tier.DEVICE: pb.KV_CACHE_TIER_DEVICE,
    Tier.HOST: pb.KV_CACHE_TIER_HOST,
    Tier.DISK: pb.KV_CACHE_TIER_DISK,
}


class KvEventStream:
    """Tells one subscriber of the pages whose KV its requests could share.

    These are full pages in an unbroken chain from the root on, all stored since it subscribed:
    others it could not place. What belongs to other tenants, or is under a salt, is not its
    business: events carry the prompts' tokens. So a page counts only if its parent does.

    Args:
        root: the parent of first pages; see `root_of`.
        page_size: tokens of a full page.
        start: the first batch's sequence number, from 1. From 2 on the subscriber was here
            before: what it knows from then is cleared first, as nobody kept what it missed.
    """

    def __init__(self, root: bytes, page_size: int, start: int = 1) -> None:
        self._root = root
        self._page_size = page_size
        self._next = start
        self._places: dict[bytes, set[_Place]] = {}  # of the pages that were told
        self._must_clear = start > 1

    def batches(self, events: Sequence[KvEvent]) -> Iterator[pb.KvEventBatch]:
        """The batches that tell of events, oldest first; none if there is nothing to tell."""
        told: list[pb.KvCacheEvent] = []
        if self._must_clear:
            told.append(pb.KvCacheEvent(cleared=pb.KvCacheCleared()))
            self._must_clear = False
        for event in events:
            told += self._messages(event)
            if len(told) >= MAX_EVENTS_PER_BATCH:
                yield self._batch(told)
                told = []
        if told:
            yield self._batch(told)

    def _batch(self, events: list[pb.KvCacheEvent]) -> pb.KvEventBatch:
        number, self._next = self._next, self._next + 1
        return pb.KvEventBatch(sequence_number=number, timestamp=time.time(), events=events)

    def _messages(self, event: KvEvent) -> Iterable[pb.KvCacheEvent]:
        place = (event.tier, event.shard)
        if event.kind is KvEventKind.STORED:
            if self._counts(event):
                self._places.setdefault(event.key, set()).add(place)
                yield self._stored(event)
        elif event.kind is KvEventKind.REMOVED:
            if place in self._places.get(event.key, ()):
                yield self._removed(event, [event.key])
        elif event.kind is KvEventKind.CLEARED:
            # The protocol's own word for it would clear all tiers.
            keys = [key for key, places in self._places.items() if place in places]
            if keys:
                yield self._removed(event, keys)
        else:
            self._places.clear()
            yield pb.KvCacheEvent(event_id=event.number, cleared=pb.KvCacheCleared())

    def _counts(self, event: KvEvent) -> bool:
        is_full = len(event.tokens) == self._page_size
        return is_full and (event.parent == self._root or event.parent in self._places)

    def _stored(self, event: KvEvent) -> pb.KvCacheEvent:
        assert event.tier is not None
        block = pb.KvBlock(
            block_hash=_hash(event.key),
            token_ids=event.tokens,
            block_size=self._page_size,
            cache_level=_LEVELS[event.tier],
        )
        stored = pb.KvBlocksStored(blocks=[block], tier=_TIERS[event.tier])
        if event.parent != self._root:
            stored.parent_block_hash = _hash(event.parent)
        return pb.KvCacheEvent(event_id=event.number, stored=stored)

    def _removed(self, event: KvEvent, keys: list[bytes]) -> pb.KvCacheEvent:
        assert event.tier is not None
        for key in keys:
            self._places[key].discard((event.tier, event.shard))
            if not self._places[key]:
                del self._places[key]
        removed = pb.KvBlocksRemoved(
            block_hashes=[_hash(key) for key in keys],
            cache_level=_LEVELS[event.tier],
            tier=_TIERS[event.tier],
        )
        return pb.KvCacheEvent(event_id=event.number, removed=removed)


def _hash(key: bytes) -> int:
    """A page's key as the protocol's int64."""
    return int.from_bytes(key[:8], "little", signed=True)
