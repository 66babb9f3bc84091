"""The stream of KV page events: complete, in order, or openly broken."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.cache.events import EventLog, KvEvent, KvEventKind, Tier


def test_a_subscriber_gets_all_events_from_then_on_once() -> None:
    log = EventLog()
    log.stored(b"early", b"root", [1], Tier.DEVICE)
    with log.subscribe() as subscription:
        log.stored(b"a", b"root", [1, 2], Tier.HOST)
        log.removed(b"a", Tier.DEVICE, shard=1)
        log.cleared(Tier.DISK)
        assert subscription.read() == [
            KvEvent(0, KvEventKind.STORED, Tier.HOST, b"a", b"root", (1, 2)),
            KvEvent(1, KvEventKind.REMOVED, Tier.DEVICE, b"a", shard=1),
            KvEvent(2, KvEventKind.CLEARED, Tier.DISK),
        ]
        assert subscription.read() == []
    log.removed(b"late", Tier.HOST)
    assert subscription.read() == []


def test_a_closed_subscription_does_not_disturb_the_others() -> None:
    log = EventLog()
    first, second = log.subscribe(), log.subscribe()
    first.close()
    first.close()
    log.removed(b"a", Tier.HOST)
    assert first.read() == []
    assert [event.key for event in second.read()] == [b"a"]


@given(capacity=st.integers(1, 4), bursts=st.lists(st.integers(0, 12), max_size=12))
def test_a_slow_reader_is_told_and_never_gets_a_gap(capacity: int, bursts: list[int]) -> None:
    log = EventLog(capacity)
    subscription = log.subscribe()
    logged = 0
    for burst in bursts:  # events between one call of read and the next
        for _ in range(burst):
            log.removed(b"key", Tier.DEVICE)
        events = subscription.read()
        assert len(events) <= capacity
        was_lost = [event.kind is KvEventKind.LOST for event in events]
        assert was_lost == [burst > capacity] + [False] * (len(events) - 1) if events else not burst
        first = events[0].number if events else logged + burst
        assert first == logged or burst > capacity
        logged += burst
        assert [event.number for event in events] == list(range(first, logged))


def test_events_of_many_threads_are_numbered_without_gaps() -> None:
    log = EventLog()
    subscription = log.subscribe()

    def work(tier: Tier) -> None:
        for i in range(500):
            log.stored(b"%d" % i, b"", [i], tier)

    threads = [threading.Thread(target=work, args=(tier,)) for tier in Tier]
    for thread in threads:
        thread.start()
    events = []
    while any(thread.is_alive() for thread in threads):
        events += subscription.read()
    for thread in threads:
        thread.join()
    events += subscription.read()
    assert [event.number for event in events] == list(range(1500))
    for tier in Tier:
        assert [e.tokens for e in events if e.tier is tier] == [(i,) for i in range(500)]


def test_a_log_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one event"):
        EventLog(0)
