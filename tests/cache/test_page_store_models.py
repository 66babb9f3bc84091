"""The page store against dumb models, and under many threads at once."""

import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.cache.page_store import PageStore
from tests.cache.harness import (
    KEYS,
    Task,
    disk_of,
    fetched,
    found,
    make_store,
    page_of,
)
from tests.waiting import PATIENCE

operations = st.lists(
    st.tuples(
        st.sampled_from(["save", "save", "save", "expect", "settle", "fetch", "pin", "unpin",
                         "discard", "flush"]),
        st.lists(st.sampled_from(KEYS[:8]), min_size=1, max_size=4),
    ),
    max_size=60,
)  # fmt: skip


class HostModel:
    """Host memory alone: keys in the order of last use, pins, and what is expected."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.held: OrderedDict[bytes, None] = OrderedDict()
        self.expected: list[bytes] = []
        self.pins: list[bytes] = []

    def expect(self, key: bytes) -> bool:
        if key in self.expected:
            return False
        if key in self.held:
            self.touch(key)
            return False
        if len(self.held) + len(self.expected) == self.num_slots:
            victim = next((key for key in self.held if key not in self.pins), None)
            if victim is None:
                return False
            del self.held[victim]
        self.expected.append(key)
        return True

    def touch(self, key: bytes) -> None:
        if key in self.held and key not in self.pins:
            self.held.move_to_end(key)

    def put(self, key: bytes) -> None:
        self.expected.remove(key)
        self.held[key] = None

    def unpin(self, key: bytes) -> None:
        self.pins.remove(key)
        self.touch(key)

    def discard(self, key: bytes) -> None:
        self.held.pop(key, None)
        if key in self.expected:
            self.expected.remove(key)

    def match(self, keys: list[bytes]) -> int:
        misses = [
            n for n, key in enumerate(keys) if key not in self.held | dict.fromkeys(self.expected)
        ]
        return misses[0] if misses else len(keys)


@settings(max_examples=150)
@given(operations)
def test_host_memory_does_exactly_as_its_model(operations: list[tuple[str, list[bytes]]]) -> None:
    store, model = make_store(4), HostModel(4)
    for operation, keys in operations:
        if operation in ("save", "expect"):
            for key in keys:
                wanted = model.expect(key)
                assert store.expect(key) == wanted
                if wanted and operation == "save":
                    store.put(key, page_of(key))
                    model.put(key)
        elif operation == "settle" and model.expected:
            key = model.expected[0]
            if keys[0] in KEYS[:4]:
                store.put(key, page_of(key))
                model.put(key)
            else:
                store.cancel(key)
                model.discard(key)
        elif operation == "fetch" and not set(keys) & set(model.expected):
            wanted = model.match(keys)
            assert fetched(store, keys) == wanted
            for key in keys[:wanted]:
                model.touch(key)
        elif operation == "pin":
            store.pin(keys)
            model.pins += keys
        elif operation == "unpin" and keys[0] in model.pins:
            store.unpin(keys[:1])
            model.unpin(keys[0])
        elif operation == "discard":
            store.discard(keys)
            for key in keys:
                model.discard(key)
        store.check()
        assert store.match(keys) == model.match(keys)
        assert {key for key in KEYS if store.match([key])} == {*model.held, *model.expected}
        assert store.stats().host.num_pages == len(model.held) <= 4
        assert store.stats().pinned_pages == len(set(model.pins))
    store.close()


class LenientModel:
    """With a disk the writer's pace decides what is evicted: what must hold at any pace."""

    def __init__(self, store: PageStore) -> None:
        self.store = store
        self.may_hold: set[bytes] = set()
        self.expected: list[bytes] = []
        self.pins: list[bytes] = []
        self.must_hold: set[bytes] = set()  # pinned while it was held

    def do(self, operation: str, keys: list[bytes]) -> None:
        store = self.store
        if operation in ("save", "expect"):
            for key in keys:
                was_held = store.match([key])
                if store.expect(key):
                    assert not was_held
                    self.may_hold.add(key)
                    self.expected.append(key)
                    if operation == "save":
                        self.bring(key)
        elif operation == "settle" and self.expected:
            self.bring(self.expected[0])
        elif operation == "fetch" and not set(keys) & set(self.expected):
            wanted = store.match(keys)
            assert fetched(store, keys) == wanted
        elif operation == "pin":
            store.pin(keys)
            self.pins += keys
            self.must_hold |= {key for key in keys if store.match([key])}
        elif operation == "unpin" and keys[0] in self.pins:
            store.unpin(keys[:1])
            self.pins.remove(keys[0])
        elif operation == "discard":
            store.discard(keys)
            self.may_hold -= set(keys)
            self.expected = [key for key in self.expected if key not in keys]
        elif operation == "flush":
            store.flush()
        self.must_hold &= self.may_hold & set(self.pins)

    def bring(self, key: bytes) -> None:
        self.store.put(key, page_of(key))
        self.expected.remove(key)

    def check(self, host_pages: int, disk_pages: int) -> None:
        self.store.check()
        held = set(found(self.store))
        assert self.must_hold <= held <= self.may_hold
        stats = self.store.stats()
        assert stats.host.num_pages <= host_pages
        assert stats.disk.num_pages <= disk_pages
        assert (stats.corrupt_pages, stats.failed_writes) == (0, 0)


@pytest.mark.parametrize("host_pages", [0, 1, 4])
@settings(max_examples=60)
@given(operations=operations, disk_pages=st.integers(1, 5))
def test_with_a_disk_pages_are_right_and_kept_over_a_restart(
    tmp_path_factory: pytest.TempPathFactory,
    host_pages: int,
    operations: list[tuple[str, list[bytes]]],
    disk_pages: int,
) -> None:
    directory = tmp_path_factory.mktemp("kv")
    store = make_store(host_pages, disk_of(directory, disk_pages))
    model = LenientModel(store)
    for operation, keys in operations:
        model.do(operation, keys)
        model.check(host_pages, disk_pages)
    for key in list(model.expected):
        model.bring(key)
    held = set(found(store))
    Task(store.close).result()
    store.check()
    store = make_store(1, disk_of(directory, disk_pages))
    kept = set(found(store))
    assert kept <= held
    assert len(kept) == min(len(held), disk_pages)
    for key in kept:
        assert fetched(store, [key]) == 1
    store.check()
    store.close()


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Threads take turns every 10 us, not every 5 ms, so that they meet in more places."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("hasty_threads")
def test_threads_never_see_a_wrong_page(tmp_path: Path) -> None:
    """An engine, two that save and two that fetch, all at once over both tiers."""
    store = make_store(4, disk_of(tmp_path, 6))
    to_save: list[bytes] = []
    num_fetched = [0, 0]
    is_over = threading.Event()

    def engine() -> bool:
        rng = np.random.default_rng(0)
        pinned: list[bytes] = []
        deadline = time.monotonic() + PATIENCE / 2
        while min(num_fetched) < 300 and time.monotonic() < deadline:
            key = KEYS[rng.integers(len(KEYS))]
            action = rng.integers(8)
            if action < 5:
                if store.expect(key):
                    to_save.append(key)
            elif action == 5 and len(pinned) < 2 and store.match([key]):
                store.pin([key])
                pinned.append(key)
            elif action == 6 and pinned:
                store.unpin([pinned.pop()])
            elif action == 7:
                store.discard([key])
            store.check()
        is_over.set()
        return min(num_fetched) >= 300

    def mover(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        while not is_over.is_set() or to_save:
            try:
                key = to_save.pop()
            except IndexError:
                time.sleep(0)
                continue
            if rng.integers(10):
                store.put(key, page_of(key))
            else:
                store.cancel(key)
        return True

    def reader(number: int) -> bool:
        rng = np.random.default_rng(3 + number)
        while not is_over.is_set():
            keys = [KEYS[i] for i in rng.integers(len(KEYS), size=3)]
            num_fetched[number] += fetched(store, keys)
        return True

    tasks = [Task(engine), Task(mover, 1), Task(mover, 2), Task(reader, 0), Task(reader, 1)]
    assert all(task.result() for task in tasks)
    store.check()
    Task(store.close).result()
    stats = store.stats()
    assert (stats.corrupt_pages, stats.failed_writes) == (0, 0)
