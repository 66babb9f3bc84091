"""Virtual token counters: fairness between tenants."""

from collections.abc import Hashable, Sequence

from jaxserve.core.request import Request
from jaxserve.scheduling.policies.base import Policy, PolicySettings, Priority, Traits
from jaxserve.scheduling.tenant_accounts import TenantAccounts


class VirtualTokenCounter(Policy):
    """The tenant that was served least goes first; requests of one tenant go by arrival.

    From "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024). Each tenant has a
    counter of what it was served: w_p = 1 per prompt token and w_q = 2 per answer token, divided
    by its weight; `TenantAccounts` says what is charged. While two tenants always have requests
    waiting, what they are served differs by at most 2 * max(w_p * longest prompt, w_q * tokens of
    a full batch). Work-conserving: if only one tenant has requests, it gets everything. Idling
    earns no credit.
    """

    traits = Traits(ages=False, reranks=True, has_groups=True, counts_service=True)

    def __init__(self, settings: PolicySettings) -> None:
        self._accounts = TenantAccounts(settings.tenant_weights)

    def priority(self, request: Request, now: float) -> Priority:
        """The arrival time, in seconds."""
        return request.arrival_time

    def priorities(self, requests: Sequence[Request], now: float) -> Sequence[Priority]:
        """Their arrival times."""
        return [request.arrival_time for request in requests]

    def group(self, request: Request) -> Hashable:
        """The tenant."""
        return request.service.tenant

    def group_priority(self, group: Hashable, now: float) -> float:
        """The tenant's counter, in weighted tokens."""
        return self._accounts.counter(group)

    def group_priorities(self, requests: Sequence[Request], now: float) -> Sequence[float]:
        """Their tenants' counters."""
        return self._accounts.counters(requests)

    def arrived(self, request: Request, now: float) -> None:
        """Open the request's account."""
        self._accounts.open(request)

    def preempted(self, request: Request, now: float) -> None:
        """The tenant has a request waiting, once more."""
        self._accounts.queue(request)

    def served(self, served: Sequence[tuple[Request, int]], now: float) -> None:
        """Charge the tenants."""
        self._accounts.charge(served)

    def finished(self, request: Request) -> None:
        """Close the request's account."""
        self._accounts.close(request)
