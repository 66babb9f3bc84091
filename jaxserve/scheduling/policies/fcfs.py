"""First come, first served."""

from jaxserve.core.request import Request
from jaxserve.scheduling.policies.base import Priority


class FirstComeFirstServed:
    """Orders by arrival. A preempted request keeps its place, ahead of all that came later."""

    def priority(self, request: Request, now: float) -> Priority:
        """The arrival time, in seconds."""
        return request.arrival_time
