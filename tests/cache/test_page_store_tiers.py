"""The page store over two tiers: what goes where, what survives a restart, and damage."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from jaxserve.cache.disk_tier import DiskTier
from jaxserve.cache.events import EventLog, KvEventKind, Tier
from tests.cache.harness import (
    KEYS,
    PAGE_BYTES,
    SLOT_BYTES,
    A,
    B,
    C,
    D,
    E,
    F,
    Gate,
    Task,
    disk_of,
    fetched,
    found,
    make_store,
    save,
)
from tests.waiting import eventually


def test_the_least_recently_used_page_goes_to_disk_and_comes_back(disk: DiskTier) -> None:
    store = make_store(3, disk)
    save(store, A, B, C)
    assert fetched(store, [A]) == 1
    save(store, D, E)  # evicts B and C
    assert set(store.keys(Tier.HOST)) == {A, D, E}
    assert fetched(store, [A, B, C, D, E]) == 5
    stats = store.stats()
    assert (stats.host.hits, stats.disk.hits) == (4, 2)
    assert (stats.host.misses, stats.disk.misses) == (2, 0)
    assert stats.host.num_bytes == 3 * PAGE_BYTES
    assert (stats.host.max_pages, stats.disk.max_pages) == (3, 6)
    assert fetched(store, [F, A]) == 0
    stats = store.stats()
    assert (stats.host.misses, stats.disk.misses) == (3, 1)
    store.close()


def test_what_is_fetched_from_disk_is_taken_into_host_memory(tmp_path: Path) -> None:
    store = make_store(0, disk_of(tmp_path, 4))
    save(store, A, B, C)
    store.close()
    store = make_store(2, disk_of(tmp_path, 4))
    assert fetched(store, [A, B]) == 2
    assert store.keys(Tier.HOST) == [A, B]
    assert fetched(store, [A, B]) == 2
    assert store.stats().host.hits == 2
    store.pin([A])
    assert fetched(store, [C]) == 1  # in place of B, which is on disk as well
    assert store.keys(Tier.HOST) == [C, A]
    store.pin([C])
    assert fetched(store, [B]) == 1  # no room
    assert store.keys(Tier.HOST) == [A, C]
    store.check()
    store.close()


def test_without_a_disk_eviction_is_loss() -> None:
    store = make_store(2)
    save(store, A, B, C)
    assert found(store) == [B, C]
    store.flush()
    assert store.stats().disk.max_pages == 0
    store.close()


def test_pinned_pages_stay_in_either_tier(tmp_path: Path) -> None:
    store = make_store(0, disk_of(tmp_path, 3))
    save(store, A, B)
    store.close()
    store = make_store(2, disk_of(tmp_path, 3))
    store.pin([A])  # on disk
    store.pin([A, C])  # C will come
    save(store, C, D, E, F, *KEYS[6:])
    assert {A, C} <= set(found(store))
    store.unpin([A])
    save(store, D, E, F)
    assert A in found(store)  # pinned once more
    store.unpin([A, C])
    save(store, *KEYS[6:])
    assert not {A, C} & set(found(store))
    with pytest.raises(ValueError, match="is not pinned"):
        store.unpin([A])
    store.close()


def test_a_restart_finds_what_was_flushed(tmp_path: Path) -> None:
    store = make_store(4, disk_of(tmp_path / "kv", 5))
    save(store, A, B, C)
    store.pin([A])
    store.flush()
    assert set(store.keys(Tier.DISK)) == {A, B, C}
    save(store, D)
    shutil.copytree(tmp_path / "kv", tmp_path / "later")  # as if the process were killed here
    store.close()
    store = make_store(4, disk_of(tmp_path / "later", 5))
    assert found(store) == [A, B, C]
    assert fetched(store, [A, B, C]) == 3
    store.close()


def test_a_disk_smaller_than_host_memory_keeps_what_was_used_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = disk_of(tmp_path, 2)
    written: list[bytes] = []
    write = disk.write
    monkeypatch.setattr(disk, "write", lambda *args: (written.append(args[1]), write(*args)))
    store = make_store(6, disk)
    save(store, A, B, C, D)
    assert fetched(store, [B]) == 1
    Task(store.close).result()
    assert written == [D, B]  # and nothing that would be overwritten at once
    store = make_store(6, disk_of(tmp_path, 2))
    assert found(store) == [B, D]
    store.close()


def test_closing_lets_transfers_come_to_their_end(tmp_path: Path) -> None:
    disk = disk_of(tmp_path, 2)
    store = make_store(0, disk)
    save(store, A, B)
    gate = Gate(disk, "read")
    fetch = Task(fetched, store, [A, B])
    gate.wait_until_entered()
    close = Task(store.close)
    assert close.is_waiting
    gate.open()
    assert fetch.result() == 1  # closing ends it before B
    close.result()


def test_flushing_waits_for_what_the_writer_has_begun(disk: DiskTier) -> None:
    store = make_store(2, disk)
    gate = Gate(disk, "write")
    save(store, A, B)
    gate.wait_until_entered()
    store.discard([B])
    flush = Task(store.flush)
    assert flush.is_waiting
    gate.open()
    flush.result()
    assert store.keys(Tier.DISK) == [A]
    store.close()


def test_a_dropped_page_makes_room_before_its_header_is_erased(tmp_path: Path) -> None:
    disk = disk_of(tmp_path, 2)
    store = make_store(0, disk)
    save(store, A, B)
    gate = Gate(disk, "erase")
    store.discard([A, B])
    gate.wait_until_entered()
    assert store.expect(C)  # in the slot that the writer has not come to yet
    assert not store.expect(D)
    gate.open()
    save(store, D)
    store.check()
    store.close()


def test_flushing_waits_for_slots_that_are_about_to_be_free(tmp_path: Path) -> None:
    disk = disk_of(tmp_path, 1)
    store = make_store(3, disk)
    save(store, A)
    store.flush()
    gate = Gate(disk, "erase")
    store.discard([A])
    gate.wait_until_entered()
    save(store, B)
    flush = Task(store.flush)
    assert flush.is_waiting
    gate.open()
    flush.result()
    assert store.keys(Tier.DISK) == [B]
    store.close()


# Damage


@pytest.mark.parametrize("host_pages", [0, 4])
def test_a_damaged_page_is_dropped_and_counted(tmp_path: Path, host_pages: int) -> None:
    store = make_store(0, disk_of(tmp_path, 6))
    save(store, A, B, C)
    store.close()
    (path,) = tmp_path.glob("*.pages")
    image = bytearray(path.read_bytes())
    image[4096 + SLOT_BYTES + 17] ^= 4  # one bit of B's contents
    path.write_bytes(image)
    log = EventLog()
    store = make_store(host_pages, disk_of(tmp_path, 6), events=log)
    assert store.match([A, B, C]) == 3  # contents are verified when they are read
    with log.subscribe() as subscription:
        assert fetched(store, [A, B, C]) == 1
        removed = [event for event in subscription.read() if event.kind is KvEventKind.REMOVED]
    assert [(event.key, event.tier) for event in removed] == [(B, Tier.DISK)]
    assert store.stats().corrupt_pages == 1
    assert store.match([A, B, C]) == 1
    assert fetched(store, [C]) == 1
    store.check()
    save(store, B)
    assert fetched(store, [A, B, C]) == 3
    store.discard([B])
    store.close()
    store = make_store(0, disk_of(tmp_path, 6))
    assert found(store) == [A, C]
    store.close()


@pytest.mark.parametrize("host_pages", [0, 2])
def test_a_broken_disk_loses_pages_and_no_more(
    disk: DiskTier,
    host_pages: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "write", refuse)
    monkeypatch.setattr(disk, "erase", refuse)
    store = make_store(host_pages, disk)
    save(store, A, B, C, D)
    eventually(lambda: store.stats().failed_writes >= 2)
    assert found(store) == ([C, D] if host_pages else [])
    assert fetched(store, [C, D]) == host_pages
    Task(store.close).result()
    assert [record.message for record in caplog.records] == [
        "cannot write KV pages to disk, and do without: [Errno 28] No space left on device"
    ]
