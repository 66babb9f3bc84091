"""KV pages that the device has no room for: host memory, and disk below it, one key space.

After CachedAttention (Gao et al., ATC 2024): conversations' KV is kept in a hierarchy of host
memory and disk, saved and fetched beside the computation, and found again on the next turn.
"""

import logging
import math
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxserve.cache.disk_tier import DiskTier
from jaxserve.cache.events import EventLog, Tier
from jaxserve.cache.host_tier import HostTier
from jaxserve.cache.page_books import PageBooks
from jaxserve.cache.page_keys import KEY_BYTES
from jaxserve.cache.slot_table import SlotTable
from jaxserve.cache.store_stats import StoreStats, TierStats
from jaxserve.core.errors import ConfigError

log = logging.getLogger(__name__)


class PageStore:
    """Keeps the contents of KV pages under their keys, in host memory and on disk.

    A page is first announced (`expect`), which reserves its slot, then brought (`put`) or called
    off (`cancel`). It goes into host memory. When that fills up, a thread of the store writes the
    least recently used pages to disk, a little ahead of need, and `expect` gives their slots
    away. It never waits: if the writer is behind, the new page is refused. On disk the least
    recently used page is overwritten. Without host memory, `put` writes to disk itself.

    A page fetched from disk is also taken into host memory if a slot is free, or if the least
    recently used page there is on disk as well, so that nothing is lost or written for it. Its
    contents are at hand, and a conversation that went on will go on again: when the device evicts
    the page it is not saved anew, being held already, so without this it would be read from disk
    at every turn. (Fetches, and saves refused because the page is held, count as its use.)

    Thread-safe. `match` takes no lock; `expect`, `cancel`, `pin`, `unpin` and `discard` take one
    that nobody holds while copying, reading, writing or waiting, so they suit the engine's
    thread. `put` copies, `fetch` copies, reads the disk and waits: they are for other threads.
    A page in transfer is never evicted. From `close` on the store takes and gives nothing.

    Args:
        page_shape: shape of a page, for example [layers, 2, kv_heads, page_size, head_dim].
        dtype: type of its elements.
        host_bytes: host memory for pages; 0 for none.
        disk: where pages go from there; closed with the store.
        events: told what is stored and removed. A page's parent and tokens are not known here
            and left empty, as vLLM does for blocks that it offloads.

    Raises:
        ConfigError: neither host memory nor disk, or not a possible amount (see `HostTier`).
        ValueError: the disk's pages are of another size.
    """

    def __init__(
        self,
        page_shape: Sequence[int],
        dtype: Any,
        *,
        host_bytes: int,
        disk: DiskTier | None = None,
        events: EventLog | None = None,
    ) -> None:
        self._page_shape, self._dtype = tuple(page_shape), np.dtype(dtype)
        self._page_bytes = math.prod(self._page_shape) * self._dtype.itemsize
        if disk is not None and disk.page_bytes != self._page_bytes:
            raise ValueError(f"pages of {self._page_bytes} bytes, on disk of {disk.page_bytes}")
        if not host_bytes and disk is None:
            raise ConfigError(
                "a page store needs room: give --host-cache-memory, --disk-cache-memory or both"
            )
        self._host, self._disk, self._events = HostTier(self._page_bytes, host_bytes), disk, events
        self._disk_slots = disk.slots if disk else SlotTable(0)
        # The lock guards all below, but that `match` reads `_held` without it.
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)  # a transfer or an expectation has ended
        self._work = threading.Condition(self._lock)  # there may be something for the writer
        self._books = PageBooks(self._host.slots, self._disk_slots, events)
        self._held = self._books.held
        self._hits: Counter[Tier] = Counter()
        self._misses: Counter[Tier] = Counter()
        self._corrupt_pages = self._failed_writes = 0
        self._is_closing = self._is_closed = False
        self._writer = threading.Thread(target=self._write_on, name="kv-page-writer", daemon=True)
        if disk:
            self._writer.start()

    # The engine's side

    def match(self, keys: Sequence[bytes]) -> int:
        """How many of `keys`, from the first on, are held in some tier or expected.

        They may be evicted until they are pinned. Takes no lock: looking into a set is atomic.
        """
        held = self._held
        for num, key in enumerate(keys):
            if key not in held:
                return num
        return len(keys)

    def expect(self, key: bytes) -> bool:
        """Reserve room for a page that is about to be saved, evicting another if need be.

        `put` or `cancel` must follow; until then a fetch of the page waits.

        Returns:
            False if there is nothing to save: the page is held or expected already, or there is
            no room (all is pinned or in transfer, or the writer is behind).

        Raises:
            ValueError: not a page's key.
        """
        if len(key) != KEY_BYTES:
            raise ValueError(f"a page's key has {KEY_BYTES} bytes, got {len(key)}")
        with self._lock:
            is_wanted = not self._is_closing and self._books.expect(key)
            self._wake()
            return is_wanted

    def cancel(self, key: bytes) -> None:
        """The page that was expected will not come. Nothing happens if none is expected."""
        with self._lock:
            if key in self._books.expected:
                self._books.drop(key)
                self._wake()

    def pin(self, keys: Iterable[bytes]) -> None:
        """Keep pages from being evicted, until as many calls of `unpin`.

        Keys that are not held may be pinned too: their pages will be, once they come.
        """
        with self._lock:
            self._books.pin(keys)

    def unpin(self, keys: Iterable[bytes]) -> None:
        """Take back one `pin` of each.

        Raises:
            ValueError: a key is not pinned.
        """
        with self._lock:
            self._books.unpin(keys)
            self._wake()

    def discard(self, keys: Iterable[bytes]) -> None:
        """Forget pages, pinned or not, in all tiers; expected ones too."""
        with self._lock:
            for key in keys:
                self._books.drop(key)
            self._wake()

    # The mover's side

    def put(self, key: bytes, page: np.ndarray) -> None:
        """Bring the contents of an expected page; they are copied.

        Nothing happens if the page is not expected any more (discarded, or the store closed).

        Raises:
            ValueError: not of the store's page shape and type; the page is called off.
        """
        if page.shape != self._page_shape or page.dtype != self._dtype:
            self.cancel(key)
            raise ValueError(
                f"a page is {self._dtype} {self._page_shape}, got {page.dtype} {page.shape}"
            )
        with self._lock:
            slot = self._books.begin_fill(key)
        if slot is None:
            return
        is_stored = False
        try:
            # As bytes: numpy copies types that it does not know (bfloat16) one by one.
            contents = np.ascontiguousarray(page).reshape(-1).view(np.uint8)
            if self._host.slots.num_slots:
                np.copyto(self._host.view(slot), contents)
                is_stored = True
            else:
                is_stored = self._write(slot, key, contents)
        finally:
            with self._lock:
                self._books.end_fill(key, is_stored)
                self._wake()

    def fetch(self, keys: Sequence[bytes], out: np.ndarray) -> int:
        """Copy pages into `out`, the leading ones that there are.

        Waits for expected pages, so the thread that brings them must be another one, or have
        brought them before; and reads from disk what is not in host memory.

        Args:
            keys: of the pages wanted.
            out: [at least len(keys), *page_shape], contiguous; rows after the leading pages that
                are intact may be overwritten with anything.

        Returns:
            How many leading pages `out` has now.

        Raises:
            ValueError: `out` does not fit.
        """
        if out.dtype != self._dtype or out.shape[1:] != self._page_shape or len(out) < len(keys):
            raise ValueError(
                f"{len(keys)} pages are {self._dtype} {(len(keys), *self._page_shape)}, got "
                f"{out.dtype} {out.shape}"
            )
        if not out.flags.c_contiguous:
            raise ValueError("pages can only be fetched into contiguous memory")
        rows = out.view(np.uint8).reshape(len(out), self._page_bytes)
        with self._lock:  # all at once, lest the last be evicted while the first are copied
            wanted = self._books.begin_fetch(keys)
            if len(wanted) < len(keys):
                self._misses.update((Tier.HOST, Tier.DISK))
        num_fetched = 0
        try:
            for key, row in zip(wanted, rows, strict=False):
                if not self._fetch_page(key, row):
                    break
                num_fetched += 1
        finally:
            with self._lock:
                self._books.end_fetch(wanted)
                self._wake()
        return num_fetched

    # Its owner's side

    def stats(self) -> StoreStats:
        """What is held now, and what happened since the start."""
        with self._lock:
            return StoreStats(
                host=self._tier_stats(Tier.HOST, self._host.slots),
                disk=self._tier_stats(Tier.DISK, self._disk_slots),
                pinned_pages=self._books.num_pinned,
                corrupt_pages=self._corrupt_pages,
                failed_writes=self._failed_writes,
            )

    def keys(self, tier: Tier) -> list[bytes]:
        """The pages that host memory or disk holds, for who follows the events from now on."""
        with self._lock:
            return (self._host.slots if tier is Tier.HOST else self._disk_slots).keys()

    def flush(self) -> None:
        """Write pages that are only in host memory to disk, if there is one.

        Of more than the disk has room for, the most recently used. The system gets them; nobody
        waits until it has them on the medium.
        """
        if self._disk is None:
            return
        self._erase_all()  # or slots that are as good as free would seem taken
        with self._lock:
            keys = self._books.to_flush()
        for key in keys:
            self._demote(key)
        with self._lock:  # those that the writer had begun with
            while any(self._books.is_demoting(key) for key in keys):
                self._settled.wait()

    def close(self) -> None:
        """End all waiting, write host pages to disk if there is one, and close it. Idempotent.

        Expected pages that have not come yet are called off, and fetches under way return what
        they have.
        """
        with self._lock:
            if self._is_closing:
                return
            self._is_closing = True
            self._held = frozenset()
            self._books.cancel_expected()
            self._wake()
            while self._books.in_transfer:
                self._settled.wait()
        self.flush()
        with self._lock:
            self._is_closed = True
            self._work.notify()
        if self._disk:
            self._writer.join()
            self._disk.close()
        if self._events:
            self._events.cleared(Tier.HOST)

    def check(self) -> None:
        """Verify the books; O(pages), for tests.

        Raises:
            AssertionError: see `PageBooks.check`.
        """
        with self._lock:
            self._books.check()

    def _tier_stats(self, tier: Tier, slots: SlotTable) -> TierStats:
        return TierStats(
            num_pages=slots.num_held,
            num_bytes=slots.num_held * self._page_bytes,
            max_pages=slots.num_slots,
            hits=self._hits[tier],
            misses=self._misses[tier],
        )

    def _wake(self) -> None:
        """Under the lock, after a change: let those look who wait for one."""
        self._settled.notify_all()
        if self._books.has_work:
            self._work.notify()

    # Transfers, without the lock but for moments

    def _fetch_page(self, key: bytes, row: np.ndarray) -> bool:
        """Copy a page that `begin_fetch` returned; whether it was there and intact."""
        with self._lock:
            while key in self._books.expected and not self._is_closing:
                self._settled.wait()
            host_slot, disk_slot = (None, None) if self._is_closing else self._books.find(key)
            (self._misses if host_slot is None else self._hits)[Tier.HOST] += 1
            self._misses[Tier.DISK] += host_slot is None and disk_slot is None
        if host_slot is not None:
            np.copyto(row, self._host.view(host_slot))
            return True
        if disk_slot is None or self._disk is None:
            return False
        is_intact = self._disk.read(disk_slot, row)
        with self._lock:
            (self._hits if is_intact else self._misses)[Tier.DISK] += 1
            if not is_intact and key in self._books.held:  # or another fetch has found out first
                self._corrupt_pages += 1
                self._books.drop(key)
            slot = self._books.begin_promotion(key) if is_intact else None
        if slot is not None:
            np.copyto(self._host.view(slot), row)
            with self._lock:
                self._books.end_promotion(key, slot)
        return is_intact

    def _demote(self, key: bytes) -> None:
        """Write a page of host memory to disk, if it is still there and not on its way."""
        with self._lock:
            slots = self._books.begin_demotion(key)
        if slots is None:
            return
        source, target = slots
        is_written = self._write(target, key, self._host.view(source))
        with self._lock:
            self._books.end_demotion(key, target, is_written)
            self._wake()

    def _write(self, slot: int, key: bytes, contents: np.ndarray) -> bool:
        """Write a page to disk; whether that went well."""
        assert self._disk is not None
        try:
            self._disk.write(slot, key, contents)
        except OSError as error:
            self._note_failure(error)
            return False
        return True

    def _erase_all(self) -> None:
        """Erase what was dropped, and wait for what the writer is erasing."""
        while True:
            with self._lock:
                slot = self._books.begin_erasure()
                while slot is None and self._books.is_erasing:
                    self._settled.wait()
            if slot is None:
                return
            self._erase(slot)

    def _erase(self, slot: int) -> None:
        assert self._disk is not None
        try:
            self._disk.erase(slot)
        except OSError as error:  # after a restart the page may be found again
            self._note_failure(error)
        with self._lock:
            self._books.end_erasure(slot)
            self._settled.notify_all()

    def _note_failure(self, error: OSError) -> None:
        with self._lock:
            self._failed_writes += 1
            is_first = self._failed_writes == 1
        if is_first:  # there may be thousands
            log.warning("cannot write KV pages to disk, and do without: %s", error)

    def _write_on(self) -> None:
        """The writer's thread: erase what was dropped, write what will be evicted soon."""
        while True:
            with self._lock:
                slot = self._books.begin_erasure()
                key = None
                if slot is None and not self._is_closing:  # then `flush` says what is written
                    key = self._books.next_to_save()
                if slot is None and key is None:
                    if self._is_closed:
                        return
                    self._work.wait()
            if slot is not None:
                self._erase(slot)
            elif key is not None:
                self._demote(key)
