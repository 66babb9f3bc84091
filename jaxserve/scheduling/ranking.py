"""The order of service: the policy's word, under slices and ageing."""

import itertools
from collections.abc import Hashable
from operator import attrgetter
from typing import NamedTuple

from jaxserve.core.request import Request
from jaxserve.scheduling.policies import Policy, Priority

_KEY, _SLICES, _LAST_PROGRESS = map(attrgetter, ("key", "num_slices", "last_progress"))
_NO_GROUPS = itertools.repeat(0.0)

# The fields of `Ranked`, without their names: the same order, made and sorted in half the time.
Rank = tuple[int, float, int, Priority, int, Request]


class Ranked(NamedTuple):
    """A request with its rank; compares by rank, the unique key breaks every tie.

    Attributes:
        tier: 0 for requests that are overdue, 1 for the others.
        group_priority: of the policy's group; of overdue requests, the arrival.
        slices: how often the request made room for others.
        priority: the policy's.
        key: the request's.
        request: the request.
    """

    tier: int
    group_priority: float
    slices: int
    priority: Priority
    key: int
    request: Request


class Ranking:
    """Ranks requests by a policy, and by how long they have waited without progress.

    A request overdue goes before all that are not, those among themselves by arrival, until it
    is finished: so none waits for ever, under any policy (FastServe and LTR promote
    starving requests, too).

    Args:
        policy: the order of all others.
        starvation_timeout: seconds without progress that make a request overdue, for policies
            that need it (`Traits.ages`).
    """

    def __init__(self, policy: Policy, starvation_timeout: float) -> None:
        traits = policy.traits
        self.policy = policy
        self._timeout = starvation_timeout if traits.ages else float("inf")
        self.has_groups = traits.has_groups
        self.is_dynamic = traits.reranks or traits.ages
        self._reranks = traits.reranks

    def due(self, request: Request) -> float:
        """When the request becomes overdue unless it makes progress, in seconds."""
        return request.last_progress + self._timeout

    def group(self, request: Request) -> Hashable:
        """The policy's group of a request."""
        return self.policy.group(request) if self.has_groups else None

    def rank(self, request: Request, now: float) -> Ranked:
        """The request's place in the order, from what is known now."""
        if request.is_overdue:
            return Ranked(0, request.arrival_time, 0, 0.0, request.key, request)
        group_priority = 0.0
        if self.has_groups:
            group_priority = self.policy.group_priority(self.policy.group(request), now)
        priority = self.policy.priority(request, now)
        return Ranked(1, group_priority, request.num_slices, priority, request.key, request)

    def rerank(self, running: list[Request], now: float) -> list[Rank] | None:
        """Running requests in their order of now; None if that cannot have changed.

        Hundreds may run, and this happens at every step: so `rank` is not called for each.

        Args:
            running: in any order.
            now: seconds.
        """
        if not (self._promote_overdue(running, now) or self._reranks):
            return None
        requests = running
        ranks: list[Rank] = [self.rank(request, now) for request in running if request.is_overdue]
        if ranks:
            requests = [request for request in running if not request.is_overdue]
        ranks += zip(
            itertools.repeat(1),
            self.policy.group_priorities(requests, now) if self.has_groups else _NO_GROUPS,
            map(_SLICES, requests),
            self.policy.priorities(requests, now),
            map(_KEY, requests),
            requests,
        )
        ranks.sort()
        return ranks

    def _promote_overdue(self, requests: list[Request], now: float) -> bool:
        """Make those overdue that have waited too long; whether there were any."""
        timeout = self._timeout
        # As a rule there are none, and the one that waited longest tells.
        if min(map(_LAST_PROGRESS, requests), default=now) + timeout > now:
            return False
        overdue = [r for r in requests if not r.is_overdue and r.last_progress + timeout <= now]
        for request in overdue:
            request.is_overdue = True
        return bool(overdue)
