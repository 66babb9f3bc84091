"""KV pages in host memory."""

import os

import numpy as np

from jaxserve.cache.slot_table import SlotTable
from jaxserve.core.errors import ConfigError


class HostTier:
    """One array of page-sized slots, and the table of who holds them.

    The array is allocated whole but not touched: the system gives it memory as pages arrive, so
    a large tier costs nothing at the start.

    Args:
        page_bytes: size of a page.
        max_bytes: host memory for pages; 0 for a tier without slots.

    Raises:
        ConfigError: `max_bytes` is negative, less than one page, or more than the machine has.

    Attributes:
        slots: which key is where.
    """

    def __init__(self, page_bytes: int, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ConfigError(f"host memory for KV pages cannot be negative, got {max_bytes} bytes")
        num_slots = max_bytes // page_bytes
        if max_bytes and not num_slots:
            raise ConfigError(
                f"{max_bytes} bytes of host memory hold no KV page: a page takes {page_bytes} "
                "bytes; give more --host-cache-memory, or 0 for none"
            )
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        try:
            if max_bytes > memory:  # the system would promise it, and later kill the server
                raise MemoryError
            self._pages = np.empty((num_slots, page_bytes), np.uint8)
        except MemoryError as error:
            raise ConfigError(
                f"no room for {max_bytes / 2**30:.1f} GiB of KV pages in host memory, of which "
                f"this machine has {memory / 2**30:.1f} GiB; give less --host-cache-memory"
            ) from error
        self.slots = SlotTable(num_slots)

    def view(self, slot: int) -> np.ndarray:
        """A slot's memory, uint8 [page_bytes].

        The caller sees to it that the slot stays its own while it reads or writes.
        """
        return self._pages[slot]
