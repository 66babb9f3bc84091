"""The page store: what waits for what, what it refuses, and how it ends."""

import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jaxserve.cache.disk_tier import DiskTier
from jaxserve.cache.events import EventLog, KvEventKind, Tier
from jaxserve.cache.page_store import PageStore
from jaxserve.core.errors import ConfigError
from tests.cache.harness import (
    KEYS,
    PAGE_BYTES,
    SHAPE,
    A,
    B,
    C,
    D,
    E,
    Gate,
    Task,
    disk_of,
    fetched,
    found,
    make_store,
    page_of,
    save,
)
from tests.waiting import eventually


@pytest.mark.parametrize("host_pages", [0, 4])
def test_a_fetch_waits_for_an_expected_page(disk: DiskTier, host_pages: int) -> None:
    store = make_store(host_pages, disk)
    save(store, A)
    assert store.expect(B)
    assert store.match([A, B, C]) == 2
    assert not store.expect(B)
    fetch = Task(fetched, store, [A, B, C])
    assert fetch.is_waiting
    store.put(B, page_of(B))
    assert fetch.result() == 2
    Task(store.close).result()


@pytest.mark.parametrize("how", ["cancel", "discard", "close", "bad page"])
def test_a_fetch_waits_no_longer_than_it_must(how: str) -> None:
    store = make_store(4)
    save(store, A)
    assert store.expect(B)
    fetch = Task(fetched, store, [A, B])
    assert fetch.is_waiting
    if how == "cancel":
        store.cancel(B)
    elif how == "discard":
        store.discard([B])
    elif how == "close":
        Task(store.close).result()
    else:
        with pytest.raises(ValueError, match="a page is int32"):
            store.put(B, np.zeros(SHAPE, np.int64))
    assert fetch.result() == 1
    assert store.match([B]) == 0
    store.put(B, page_of(B))  # too late: nothing happens
    store.cancel(B)
    assert store.match([B]) == 0
    store.check()
    store.close()


def test_what_the_engine_calls_waits_for_no_disk(disk: DiskTier) -> None:
    store = make_store(2, disk)
    gate = Gate(disk, "write")
    save(store, A, B)
    gate.wait_until_entered()  # the writer is stuck with A

    def engine() -> list[Any]:
        results = [store.match([A, B]), store.expect(C), store.expect(A)]
        store.pin([B])
        store.unpin([B])
        store.discard([B])
        return [*results, store.match([A, B]), store.expect(C), store.expect(D)]

    # C is refused while the writer is behind; then it takes the place of B; then all are busy
    assert Task(engine).result() == [2, False, False, 1, True, False]
    store.cancel(C)
    gate.open()
    save(store, C, D, E)
    assert fetched(store, [A, C, D, E]) == 4
    store.check()
    store.close()


def test_match_takes_no_lock() -> None:
    store = make_store(2)
    save(store, A)
    with store._lock:
        assert Task(store.match, [A, B]).result() == 1
    store.close()


def test_a_page_in_transfer_stays(disk: DiskTier) -> None:
    store = make_store(0, disk)
    save(store, *KEYS[:6])
    gate = Gate(disk, "read")
    fetch = Task(fetched, store, KEYS[:6])
    gate.wait_until_entered()
    assert not store.expect(KEYS[7])  # all slots are being read, or about to be
    store.discard([A, B])
    store.check()
    assert store.match([A]) == 0
    assert not store.expect(A)  # its old self is still there
    gate.open()
    assert fetch.result() == 1  # A was being copied; B was gone when its turn came
    store.check()
    eventually(lambda: disk.slots.num_free == 2)
    save(store, KEYS[7], KEYS[8])
    assert fetched(store, KEYS[2:6]) == 4
    store.close()


@pytest.mark.parametrize("host_pages", [0, 2])
def test_a_page_discarded_while_it_is_written_never_comes_back(
    tmp_path: Path, host_pages: int
) -> None:
    disk = disk_of(tmp_path, 4)
    store = make_store(host_pages, disk)
    gate = Gate(disk, "write")
    assert store.expect(A)
    put = Task(store.put, A, page_of(A))
    gate.wait_until_entered() if not host_pages else put.result()
    if host_pages:
        save(store, B)  # now the writer works on A
        gate.wait_until_entered()
    store.discard([A])
    assert store.match([A]) == 0
    store.check()
    gate.open()
    put.result()
    store.check()
    Task(store.close).result()
    store = make_store(2, disk_of(tmp_path, 4))
    assert found(store) == ([B] if host_pages else [])
    store.close()


def test_events_tell_what_is_where(disk: DiskTier) -> None:
    log = EventLog()
    store = make_store(2, disk, events=log)
    with log.subscribe() as subscription:
        held: set[tuple[bytes, Tier | None]] = set()
        save(store, A, B, C, D)
        store.discard([D])
        assert fetched(store, [A]) == 1
        store.flush()
        for event in subscription.read():
            if event.kind is KvEventKind.STORED:
                assert (event.key, event.tier) not in held
                held.add((event.key, event.tier))
            else:
                held.remove((event.key, event.tier))
        tiers = (Tier.HOST, Tier.DISK)
        assert held == {(key, tier) for tier in tiers for key in store.keys(tier)}
        assert {key for key, _ in held} == {A, B, C}
        store.close()
        assert [event.kind for event in subscription.read()] == [KvEventKind.CLEARED]


def test_any_type_and_any_memory_order_of_a_page() -> None:
    store = PageStore((4, 3), ml_dtypes.bfloat16, host_bytes=100)
    page = np.arange(12).reshape(3, 4).astype(ml_dtypes.bfloat16).T
    assert store.expect(A)
    store.put(A, page)
    out = np.zeros((1, 4, 3), ml_dtypes.bfloat16)
    assert store.fetch([A], out) == 1
    np.testing.assert_array_equal(out[0], page)
    page[:] = 0
    assert store.fetch([A], out) == 1
    assert out.any()  # it was copied
    store.close()


def test_bad_arguments_are_refused(disk: DiskTier) -> None:
    with pytest.raises(ConfigError, match="give --host-cache-memory"):
        make_store(0)
    with pytest.raises(ConfigError, match="give more --host-cache-memory"):
        PageStore(SHAPE, np.int32, host_bytes=PAGE_BYTES - 1)
    with pytest.raises(ValueError, match="pages of 120 bytes, on disk of 60"):
        PageStore(SHAPE, np.int64, host_bytes=0, disk=disk)
    store = make_store(2)
    save(store, A)
    with pytest.raises(ValueError, match="16 bytes, got 3"):
        store.expect(b"abc")
    for out in (np.zeros((1, *SHAPE), np.int64), np.zeros((1, 5, 3), np.int32),
                np.zeros((0, *SHAPE), np.int32)):  # fmt: skip
        with pytest.raises(ValueError, match="1 pages are int32"):
            store.fetch([A], out)
    with pytest.raises(ValueError, match="contiguous"):
        store.fetch([A], np.zeros((1, 5, 3), np.int32).transpose(0, 2, 1))
    assert store.fetch([], np.zeros((0, *SHAPE), np.int32)) == 0
    store.close()


def test_a_closed_store_takes_and_gives_nothing(disk: DiskTier) -> None:
    store = make_store(2, disk)
    save(store, A)
    assert store.expect(B)
    for _ in range(2):
        Task(store.close).result()
    assert store.match([A]) == 0
    assert not store.expect(C)
    store.put(B, page_of(B))
    store.cancel(B)
    store.discard([A])
    assert fetched(store, [A]) == 0
    assert not [t for t in threading.enumerate() if t is store._writer]


def test_check_finds_a_lost_slot() -> None:
    store = make_store(2)
    save(store, A)
    store._host.slots.take()
    with pytest.raises(AssertionError, match="1 slots accounted for, of 2"):
        store.check()
    store._host.slots.give_back(1)
    store.check()
    store._books.held.discard(A)
    with pytest.raises(AssertionError, match="what is held"):
        store.check()
    store.close()
