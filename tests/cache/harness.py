"""What the tests of the page store share: pages, stores, and calls that may hang."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.cache.disk_tier import DiskTier
from jaxserve.cache.page_store import PageStore
from tests.waiting import PATIENCE, eventually

SHAPE = (3, 5)
PAGE_BYTES = 60
SLOT_BYTES = 4096  # of so small a page on disk
KEYS = [bytes([number]) * 16 for number in range(12)]
A, B, C, D, E, F = KEYS[:6]


def page_of(key: bytes) -> np.ndarray:
    return np.arange(15, dtype=np.int32).reshape(SHAPE) + key[0] * 100


def disk_of(directory: Path, num_pages: int) -> DiskTier:
    return DiskTier(directory, PAGE_BYTES, "model", SLOT_BYTES * (num_pages + 1))


def make_store(host_pages: int, disk: DiskTier | None = None, **kwargs: Any) -> PageStore:
    return PageStore(SHAPE, np.int32, host_bytes=host_pages * PAGE_BYTES, disk=disk, **kwargs)


def save(store: PageStore, *keys: bytes) -> None:
    for key in keys:
        eventually(lambda key=key: store.expect(key))
        store.put(key, page_of(key))


def fetched(store: PageStore, keys: Sequence[bytes]) -> int:
    """How many pages a fetch brings, after comparing them."""
    out = np.full((len(keys) + 1, *SHAPE), -1, np.int32)
    num = store.fetch(keys, out)
    for key, page in zip(keys[:num], out, strict=False):
        np.testing.assert_array_equal(page, page_of(key))
    assert (out[len(keys)] == -1).all()
    return num


def found(store: PageStore) -> list[bytes]:
    return [key for key in KEYS if store.match([key])]


class Task:
    """A call on a thread of its own, so that one that hangs fails its test."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self._thread = threading.Thread(target=self._run, args=(call, args), daemon=True)
        self._outcome: list[Any] = []
        self._thread.start()

    def _run(self, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._outcome.append(call(*args))

    @property
    def is_waiting(self) -> bool:
        self._thread.join(0.05)
        return self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join(PATIENCE)
        assert self._outcome, "it hangs, or has failed"
        return self._outcome[0]


class Gate:
    """Stops calls of a method until it is opened."""

    def __init__(self, owner: Any, method: str) -> None:
        self._real = getattr(owner, method)
        self._open = threading.Event()
        self.entered = threading.Event()
        setattr(owner, method, self._call)

    def _call(self, *args: Any) -> Any:
        self.entered.set()
        assert self._open.wait(PATIENCE)
        return self._real(*args)

    def wait_until_entered(self) -> None:
        assert self.entered.wait(PATIENCE)

    def open(self) -> None:
        self._open.set()
