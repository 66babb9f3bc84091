"""Threads that take KV pages from the device to the page store, and from there to the device.

One takes gathered pages to the host and into the store, the other reads the store and sends pages
to the device. They launch no programs and never touch the pool: that is for `page_mover`.
"""

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxserve.cache.page_layout import PageLayout
from jaxserve.cache.page_store import PageStore
from jaxserve.core.at_exit import close_at_exit
from jaxserve.core.step import PageFetch
from jaxserve.runner.lowering import StepLowering
from pallas_kernels.kv_pages import KvPool

log = logging.getLogger(__name__)

# Saved pages wait on the device until they are on the host. With more than this of them on each
# device, further ones are given up: a page that is not kept costs its recomputation, while
# waiting would stop every running request.
MAX_SAVING_BYTES = 2**30
MAX_FETCHED_PIECES = 4  # on the device before `poll` has put them into the pool

ShardParts = list[list[jax.Array]]  # of pages: values, and scales if there are some; by heads


class Staging:
    """Makes the arrays that carry pages from the host to one shard's devices."""

    def __init__(self, lowering: StepLowering) -> None:
        self._lowering = lowering
        self._nothing: dict[int, KvPool] = {}

    def nothing(self, n: int) -> KvPool:
        """Pages for no shard; kept where other shards' fetches need a part for idle ones."""
        if n not in self._nothing:
            zeros = jax.tree.map(
                lambda pages: jax.device_put(np.zeros(pages.shape, pages.dtype), pages.sharding),
                self._lowering.pages(n),
            )
            if self._lowering.rules.data == 1:
                return zeros
            self._nothing[n] = zeros
        return self._nothing[n]

    def on_host(self, n: int) -> np.ndarray:
        """Room for `n` pages as they are stored; new each time, as the device may share it."""
        layout = self._lowering.page_layout
        return np.empty((n, *layout.shape), layout.dtype)

    def on_device(self, shard: int, pages: np.ndarray) -> KvPool:
        """Send pages to a shard and wait until they are there.

        Args:
            shard: whose.
            pages: from `on_host`; must not change afterwards.

        Returns:
            See `StepLowering.pages`.
        """
        whole = self._lowering.pages(len(pages))
        arrays = self._lowering.page_layout.split(pages)
        parts = jax.tree.leaves(whole), arrays, self._idle(len(pages))
        sent = [self._sent(shard, *one) for one in zip(*parts, strict=True)]
        return jax.block_until_ready(jax.tree.unflatten(jax.tree.structure(whole), sent))

    def _sent(
        self,
        shard: int,
        whole: jax.ShapeDtypeStruct,
        pages: np.ndarray,
        idle_parts: Sequence[jax.Shard],
    ) -> jax.Array:
        """One array of the pages on its way to a shard; other shards get nothing sent."""
        assert whole.sharding is not None
        idle = {part.device: part.data for part in idle_parts}
        parts = []
        for device, index in whole.sharding.addressable_devices_indices_map(whole.shape).items():
            assert index is not None
            if index[0].indices(whole.shape[0])[0] == shard:
                parts.append(jax.device_put(pages[None, :, :, :, index[4]], device))
            else:
                parts.append(idle[device])
        return jax.make_array_from_single_device_arrays(whole.shape, whole.sharding, parts)

    def _idle(self, n: int) -> list[Sequence[jax.Shard]]:
        """What idle shards have of each array."""
        if self._lowering.rules.data == 1:
            return [()] * len(self._lowering.page_layout.shapes)
        return [array.addressable_shards for array in jax.tree.leaves(self.nothing(n))]


class Saver:
    """Takes gathered pages to the host and into the store, on a thread of its own."""

    def __init__(self, store: PageStore, layout: PageLayout, max_bytes: int) -> None:
        self._store = store
        self._layout = layout
        self._max_bytes = max_bytes
        self._bytes = 0  # under way
        self._lock = threading.Lock()
        self._lost = 0
        self._queue: queue.SimpleQueue[_Saved | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="page-saver", daemon=True)
        self._thread.start()
        close_at_exit(self)

    def save(self, keys: list[list[bytes]], gather: Callable[[], KvPool], num_bytes: int) -> None:
        """Launch a piece of saves, or give it up if it fails or too much is under way.

        Args:
            keys: per shard, of its first pages in what is gathered.
            gather: launches the program; see `StepLowering.pages`.
            num_bytes: what the gathered pages take on each device.
        """
        every_key = [key for shard in keys for key in shard]
        with self._lock:
            has_room = self._bytes == 0 or self._bytes + num_bytes <= self._max_bytes
        if not has_room:
            if not self._lost:
                log.warning("KV pages leave the device faster than the host takes them")
            self._lost += len(every_key)
            return _cancel(self._store, every_key)
        try:
            pages = gather()
            parts = [
                parts_of_shard(pages, shard) if wanted else [] for shard, wanted in enumerate(keys)
            ]
            for part in jax.tree.leaves(parts):
                part.copy_to_host_async()
        except Exception:  # no room on the device, most likely; the pool is as it was
            log.exception("%d KV pages could not be saved", len(every_key))
            return _cancel(self._store, every_key)
        with self._lock:
            self._bytes += num_bytes
        self._queue.put(_Saved(keys, parts, num_bytes))

    def close(self) -> None:
        """Bring what is under way into the store, then end the thread. Idempotent."""
        self._queue.put(None)
        self._thread.join()

    def close_at_exit(self) -> None:
        """Close, if the engine was dropped without doing so: its thread reads from the device."""
        self.close()

    def _run(self) -> None:
        while (saved := self._queue.get()) is not None:
            for keys, parts in zip(saved.keys, saved.parts, strict=True):
                self._put(keys, parts)
            with self._lock:
                self._bytes -= saved.num_bytes
            del saved, parts  # while waiting for the next one, hold nothing

    def _put(self, keys: list[bytes], parts: ShardParts) -> None:
        left = deque(keys)
        try:
            if keys:
                for page in to_host(parts, self._layout)[: len(keys)]:
                    self._store.put(left[0], page)
                    left.popleft()
        except Exception:
            log.exception("%d KV pages could not be saved", len(left))
            _cancel(self._store, left)


class _Saved(NamedTuple):
    """Pages on their way to the store: per shard, their keys and their parts."""

    keys: list[list[bytes]]
    parts: list[ShardParts]
    num_bytes: int


class Piece(NamedTuple):
    """Some pages of a fetch on the device; or, with no contents, the fetch's end.

    Attributes:
        fetch: what they belong to.
        first: how many of its pages came before.
        count: how many these are.
        contents: see `StepLowering.pages`.
    """

    fetch: PageFetch
    first: int
    count: int
    contents: KvPool | None


class Fetcher:
    """Reads pages from the store and sends them to the device, on a thread of its own."""

    def __init__(self, store: PageStore, staging: Staging, sizes: Sequence[int]) -> None:
        self._store = store
        self._staging = staging
        self._sizes = sizes
        self._under_way = 0  # fetches whose end was not taken yet
        self._arrived: deque[Piece] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._queue: queue.SimpleQueue[PageFetch | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="page-fetcher", daemon=True)
        self._thread.start()

    def start(self, fetch: PageFetch) -> None:
        """Fetch these pages after those before."""
        self._under_way += 1
        self._queue.put(fetch)

    def take(self) -> Piece | None:
        """What arrived next, in order; None if that is still to come."""
        if not self._arrived:
            return None
        with self._changed:
            piece = self._arrived.popleft()
            self._changed.notify()
        self._under_way -= piece.contents is None
        return piece

    def wait(self) -> bool:
        """Block until there is something to take; False if nothing will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._arrived or self._closing or not self._under_way)
            return bool(self._arrived)

    def stop(self) -> None:
        """Give up the fetches."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread, once the store lets go of it. Idempotent."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (fetch := self._queue.get()) is not None:
            done = 0
            try:
                while done < len(fetch.pages) and not self._closing:
                    n = piece_size(self._sizes, len(fetch.pages) - done)
                    count = self._fetch(fetch, done, n)
                    done += count
                    if count < n:
                        break
            except Exception:
                log.exception("%d KV pages could not be fetched", len(fetch.pages) - done)
            self._arrive(Piece(fetch, done, 0, None))

    def _fetch(self, fetch: PageFetch, first: int, n: int) -> int:
        """Bring the next `n` pages as far as the store has them; returns how many it had."""
        pages = self._staging.on_host(n)
        count = self._store.fetch(fetch.keys[first : first + n], pages)
        if count:
            contents = self._staging.on_device(fetch.shard, pages)
            self._arrive(Piece(fetch, first, count, contents))
        return count

    def _arrive(self, piece: Piece) -> None:
        with self._changed:
            room = MAX_FETCHED_PIECES
            self._changed.wait_for(lambda: self._closing or len(self._arrived) < room)
            self._arrived.append(piece)
            self._changed.notify()


def piece_size(sizes: Sequence[int], total: int) -> int:
    """The largest piece that `total` pages fill."""
    return max(n for n in sizes if n <= total)


def parts_of_shard(pages: KvPool, shard: int) -> ShardParts:
    """One shard's pages: each array as its parts by heads, [1, n, ...]."""

    def parts_of(array: jax.Array) -> list[jax.Array]:
        parts = {}
        for part in array.addressable_shards:
            if part.replica_id == 0 and part.index[0].indices(array.shape[0])[0] == shard:
                parts[part.index[4].indices(array.shape[4])[0]] = part.data
        return [parts[first_head] for first_head in sorted(parts)]

    return [parts_of(array) for array in jax.tree.leaves(pages)]


def to_host(parts: ShardParts, layout: PageLayout) -> np.ndarray:
    """One shard's pages as they are stored, [n, ...]; blocks until they are there."""

    def whole(parts: list[jax.Array]) -> np.ndarray:
        arrays = [np.asarray(part)[0] for part in parts]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=3)

    return layout.joined([whole(array) for array in parts])


def _cancel(store: PageStore, keys: Sequence[bytes] | deque[bytes]) -> None:
    """Tell the store that pages will not come; what it says to that stops nobody."""
    for key in keys:
        try:
            store.cancel(key)
        except Exception:
            log.exception("the page store does not let go of a page")
