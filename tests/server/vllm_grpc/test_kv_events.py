"""KV events as a gateway gets them."""

from jaxserve.cache.events import EventLog, KvEvent, KvEventKind, Subscription, Tier
from jaxserve.cache.page_keys import page_key, root_key
from jaxserve.server.vllm_grpc.kv_events import MAX_EVENTS_PER_BATCH, KvEventStream

ROOT, OTHER = root_key("mine"), root_key("other")
A = page_key(ROOT, [1, 2])
B = page_key(A, [3, 4])


class Following:
    """A log, a subscription, and what of it a gateway is told."""

    def __init__(self, start: int = 1, capacity: int = 65536) -> None:
        self.log = EventLog(capacity)
        self.subscription: Subscription = self.log.subscribe()
        self.stream = KvEventStream(ROOT, 2, start)

    def told(self) -> list[tuple]:
        events = []
        for batch in self.stream.batches(self.subscription.read()):
            for event in batch.events:
                kind = event.WhichOneof("data")
                if kind == "stored":
                    [block] = event.stored.blocks
                    assert block.block_size == 2 and len(block.token_ids) == 2
                    has_parent = event.stored.HasField("parent_block_hash")
                    parent = event.stored.parent_block_hash if has_parent else None
                    events.append((block.block_hash, parent, block.cache_level))
                elif kind == "removed":
                    hashes = tuple(sorted(event.removed.block_hashes))
                    events.append(("removed", hashes, event.removed.cache_level))
                else:
                    events.append((kind,))
        return events


def number(key: bytes) -> int:
    return int.from_bytes(key[:8], "little", signed=True)


def test_chains_from_the_root_are_told_and_nothing_else() -> None:
    f = Following()
    f.log.stored(A, ROOT, [1, 2], Tier.DEVICE)
    f.log.stored(page_key(OTHER, [1, 2]), OTHER, [1, 2], Tier.DEVICE)  # another tenant's
    f.log.stored(B, A, [3, 4], Tier.DEVICE)
    f.log.stored(page_key(B, [5]), B, [5], Tier.DEVICE)  # a tail
    f.log.stored(page_key(b"x" * 16, [7, 8]), b"x" * 16, [7, 8], Tier.DEVICE)  # from before
    assert f.told() == [(number(A), None, 0), (number(B), number(A), 0)]
    assert f.told() == []


def test_a_page_may_be_in_several_places() -> None:
    f = Following()
    f.log.stored(A, ROOT, [1, 2], Tier.DEVICE, shard=0)
    f.log.stored(A, ROOT, [1, 2], Tier.HOST)
    f.log.removed(A, Tier.DEVICE, shard=1)  # not told to be there
    f.log.removed(A, Tier.DEVICE, shard=0)
    f.log.stored(B, A, [3, 4], Tier.DISK)  # its parent is still somewhere
    f.log.removed(A, Tier.HOST)
    f.log.stored(page_key(A, [9, 9]), A, [9, 9], Tier.DEVICE)  # its parent is nowhere
    h = number(A)
    assert f.told() == [
        (h, None, 0), (h, None, 1), ("removed", (h,), 0), (number(B), h, 2), ("removed", (h,), 1),
    ]  # fmt: skip


def test_a_cleared_tier_is_told_page_by_page() -> None:
    f = Following()
    f.log.stored(A, ROOT, [1, 2], Tier.DEVICE)
    f.log.stored(B, A, [3, 4], Tier.DEVICE)
    f.log.stored(A, ROOT, [1, 2], Tier.HOST)
    f.told()
    f.log.cleared(Tier.DEVICE)
    f.log.cleared(Tier.DISK)
    assert f.told() == [("removed", tuple(sorted((number(A), number(B)))), 0)]


def test_who_fell_behind_or_was_away_begins_anew() -> None:
    f = Following(capacity=2)
    f.log.stored(A, ROOT, [1, 2], Tier.DEVICE)
    f.told()
    for tokens in ([1, 1], [2, 2], [3, 3], [4, 4]):
        f.log.stored(page_key(ROOT, tokens), ROOT, tokens, Tier.DEVICE)
    told = f.told()
    assert told[0] == ("cleared",) and told[-1][0] == number(page_key(ROOT, [4, 4]))
    f.log.stored(B, A, [3, 4], Tier.DEVICE)  # A was forgotten with all else
    assert f.told() == []

    again = Following(start=17)
    [batch] = again.stream.batches([])
    assert batch.sequence_number == 17 and batch.events[0].HasField("cleared")
    assert again.told() == []


def test_batches_are_numbered_in_a_row_and_not_too_large() -> None:
    stream = KvEventStream(ROOT, 1)
    events = [
        KvEvent(i, KvEventKind.STORED, Tier.DEVICE, page_key(ROOT, [i]), ROOT, (i,))
        for i in range(2 * MAX_EVENTS_PER_BATCH + 1)
    ]
    batches = list(stream.batches(events))
    assert [batch.sequence_number for batch in batches] == [1, 2, 3]
    assert [len(batch.events) for batch in batches] == [MAX_EVENTS_PER_BATCH] * 2 + [1]
