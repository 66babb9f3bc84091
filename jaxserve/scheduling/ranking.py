"""The order of service: the policy's word, under slices and ageing."""

import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from jaxserve.core.request import Request
from jaxserve.scheduling.policies import Policy, Priority


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
    is finished: whatever the policy prefers, nobody waits for ever (FastServe and LTR promote
    starving requests likewise).

    Args:
        policy: the order of all others.
        starvation_timeout: seconds without progress that make a request overdue, for policies
            that need it (`Policy.ages`).
    """

    def __init__(self, policy: Policy, starvation_timeout: float) -> None:
        self.policy = policy
        self._timeout = starvation_timeout if policy.ages else float("inf")
        # Plain methods of the base class say nothing, and need not be asked.
        self.has_groups = type(policy).group is not Policy.group
        self.is_dynamic = policy.reranks or policy.ages
        self._reranks = policy.reranks

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

    def rerank(self, running: list[Ranked], now: float) -> list[Ranked]:
        """Running requests in their order of now.

        Args:
            running: in the order of before.
            now: seconds.
        """
        timeout = self._timeout
        late = [
            entry.request
            for entry in running
            if entry.tier and entry.request.last_progress + timeout <= now
        ]
        for request in late:
            request.is_overdue = True
        if not (late or self._reranks):
            return running
        # As `rank`, without the calls: hundreds may run, and this happens at every step.
        policy, make = self.policy, tuple.__new__
        requests = [entry.request for entry in running]
        group_priorities = self._group_priorities(requests, now)
        ranked, any_new = [], False
        for entry, request, group_priority, priority in zip(
            running, requests, group_priorities, policy.priorities(requests, now), strict=True
        ):
            if entry.tier == 0 or (
                not request.is_overdue
                and entry.priority == priority
                and entry.group_priority == group_priority
            ):
                ranked.append(entry)
                continue
            if request.is_overdue:
                new = self.rank(request, now)
            else:
                fields = (1, group_priority, request.num_slices, priority, request.key, request)
                new = make(Ranked, fields)
            ranked.append(new)
            any_new = True
        if not any_new:
            return running
        ranked.sort()
        return ranked

    def _group_priorities(self, requests: Sequence[Request], now: float) -> Iterable[float]:
        if not self.has_groups:
            return itertools.repeat(0.0, len(requests))
        groups = [self.policy.group(request) for request in requests]
        ranks = {group: self.policy.group_priority(group, now) for group in dict.fromkeys(groups)}
        return [ranks[group] for group in groups]
