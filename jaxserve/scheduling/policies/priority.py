"""Priorities that clients give, with ageing."""

from jaxserve.core.request import Request
from jaxserve.scheduling.policies.base import Policy, Priority, Traits

AGEING = 0.1  # priority levels per second


class ClientPriority(Policy):
    """Smaller `ServiceParams.priority` first, as in vLLM; ten seconds of waiting make up one level.

    Ageing is linear, `priority - AGEING * (now - arrival)`. The term in `now` is the same for
    all, so the rank leaves it out and never changes. Priorities may lie so far apart that ageing
    alone would take hours: the starvation timeout holds beside it.

    A newcomer displaces only what clients called less important: to be old is enough to go before
    others in the queue, not to take the place of one that runs.
    """

    traits = Traits(displaces=True)

    def priority(self, request: Request, now: float) -> Priority:
        """The client's level, in levels; later arrivals are worse off by so much."""
        return request.service.priority + AGEING * request.arrival_time

    def displaces(self, newcomer: Request, running: Request, now: float) -> bool:
        """Whether the newcomer's own level is the better one."""
        return newcomer.service.priority < running.service.priority
