"""Requests in policy order, without ever sorting the queue."""

import heapq
from typing import NamedTuple

from jaxserve.core.request import Request
from jaxserve.scheduling.policies import Priority

_MIN_DEAD_TO_COMPACT = 64


class Ranked(NamedTuple):
    """A request with its rank; compares by rank, the unique key breaks every tie."""

    priority: Priority
    key: int
    request: Request


class WaitingQueue:
    """A heap with lazy removal: push and pop O(log n), discard O(1) amortised.

    Waiting requests may be many thousands, and clients abandon them: a discarded one stays in
    the heap as a dead entry until it surfaces or dead entries outnumber the living. Discarding
    is for good: a request that left this way must not come back.
    """

    def __init__(self) -> None:
        self._heap: list[Ranked] = []
        self._live: set[int] = set()

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, request: Request) -> bool:
        return request.key in self._live

    def push(self, entry: Ranked) -> None:
        """Let a request join at the place its rank gives it."""
        heapq.heappush(self._heap, entry)
        self._live.add(entry.key)

    def peek(self) -> Ranked | None:
        """The first in order, or None when nobody waits."""
        while self._heap and self._heap[0].key not in self._live:
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None

    def pop(self) -> Ranked:
        """Take out the first in order.

        Raises:
            IndexError: nobody waits.
        """
        entry = self.peek()
        if entry is None:
            raise IndexError("pop from an empty waiting queue")
        heapq.heappop(self._heap)
        self._live.remove(entry.key)
        return entry

    def discard(self, request: Request) -> None:
        """Forget a request that ended while waiting."""
        self._live.discard(request.key)
        dead = len(self._heap) - len(self._live)
        if dead > max(_MIN_DEAD_TO_COMPACT, len(self._live)):
            self._heap = [entry for entry in self._heap if entry.key in self._live]
            heapq.heapify(self._heap)
