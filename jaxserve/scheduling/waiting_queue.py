"""Requests that wait, in order, without ever sorting the queue."""

import heapq
from collections import deque
from collections.abc import Callable, Hashable

from jaxserve.core.request import Request
from jaxserve.scheduling.ranking import Ranked, Ranking

_MIN_DEAD_TO_COMPACT = 64


class WaitingQueue:
    """Heaps with lazy removal: push and pop O(log n), discard O(1) amortised, however many wait.

    Each of the policy's groups has a heap by priority, and the groups have one by group
    priority, which may have risen since it was noted: what comes up is asked again. Overdue
    requests have a heap of their own, which goes first.

    A request that left stays in its heap as a dead entry until it surfaces, or until the dead
    outnumber the living (clients abandon requests by the thousand).

    Args:
        ranking: the order.
    """

    def __init__(self, ranking: Ranking) -> None:
        self._ranking = ranking
        self._live: dict[int, Ranked] = {}
        self._clear_heaps()

    def _clear_heaps(self) -> None:
        self._groups: dict[Hashable, list[Ranked]] = {}
        self._order: list[tuple[float, int, Hashable]] = []  # group priority, age of the group
        self._num_groups = 0
        self._overdue: list[Ranked] = []
        self._due: list[tuple[float, Ranked]] = []
        self._rotation: deque[Ranked] = deque()
        self._num_entries = 0

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, request: Request) -> bool:
        return request.key in self._live

    def push(self, request: Request, now: float) -> None:
        """Let a request join at the place its rank gives it, or move there if it waits already."""
        self._put(self._ranking.rank(request, now))
        self._compact()

    def _put(self, entry: Ranked) -> None:
        request, group_priority = entry.request, entry.group_priority
        if self._ranking.has_groups and entry.tier:
            # What the group ranked when a request joined says nothing about its place in the group.
            entry = entry._replace(group_priority=0.0)
        self._live[entry.key] = entry
        self._num_entries += 1
        if entry.tier == 0:
            heapq.heappush(self._overdue, entry)
            return
        if (due := self._ranking.due(request)) < float("inf"):
            heapq.heappush(self._due, (due, entry))
        if self._ranking.policy.traits.refreshes:
            self._rotation.append(entry)
        group = self._ranking.group(request)
        heap = self._groups.get(group)
        if heap is None:
            heap = self._groups[group] = []
            self._num_groups += 1
            heapq.heappush(self._order, (group_priority, self._num_groups, group))
        heapq.heappush(heap, entry)

    def _is_live(self, entry: Ranked) -> bool:
        return self._live.get(entry.key) is entry

    def peek(self, now: float) -> Ranked | None:
        """The first in order, or None when none waits."""
        self._age(now)
        if (entry := self._top(self._overdue)) is not None:
            return entry
        while self._order:
            noted, number, group = self._order[0]
            entry = self._top(self._groups[group])
            if entry is None:
                heapq.heappop(self._order)
                del self._groups[group]
                continue
            if not self._ranking.has_groups:
                return entry
            current = self._ranking.policy.group_priority(group, now)
            if current <= noted:
                return entry._replace(group_priority=current)
            heapq.heapreplace(self._order, (current, number, group))
        return None

    def _top(self, heap: list[Ranked]) -> Ranked | None:
        while heap and not self._is_live(heap[0]):
            heapq.heappop(heap)
            self._num_entries -= 1
        return heap[0] if heap else None

    def _age(self, now: float) -> None:
        """Let those go first that have waited too long."""
        while self._due and (self._due[0][0] <= now or not self._is_live(self._due[0][1])):
            _, entry = heapq.heappop(self._due)
            if self._is_live(entry):
                entry.request.is_overdue = True
                self._put(self._ranking.rank(entry.request, now))

    def refresh(self, now: float, limit: int, look: Callable[[Request], None]) -> None:
        """Rank again the first in line until it stays first, and a few others in turn.

        Args:
            now: seconds.
            limit: of either, how many at most.
            look: brings a request up to date before it is ranked.
        """
        for _ in range(limit):
            entry = self.peek(now)
            if entry is None or not self._rank_again(entry.request, now, look):
                break
        for _ in range(min(limit, len(self._rotation))):
            entry = self._rotation.popleft()
            if self._is_live(entry) and not self._rank_again(entry.request, now, look):
                self._rotation.append(entry)

    def _rank_again(self, request: Request, now: float, look: Callable[[Request], None]) -> bool:
        """Whether its rank has changed."""
        look(request)
        old, new = self._live[request.key], self._ranking.rank(request, now)
        if (old.tier, old.priority) == (new.tier, new.priority):
            return False
        self._put(new)
        self._compact()
        return True

    def discard(self, request: Request) -> None:
        """Forget a request: it starts, or it ended while waiting."""
        if self._live.pop(request.key, None) is not None:
            self._compact()

    def _compact(self) -> None:
        dead = self._num_entries - len(self._live)
        if dead > max(_MIN_DEAD_TO_COMPACT, len(self._live)):
            self._clear_heaps()
            for entry in list(self._live.values()):
                self._put(entry)
