"""First come, first served."""

from jaxserve.core.request import Request
from jaxserve.scheduling.policies.base import Policy, Priority, Traits


class FirstComeFirstServed(Policy):
    """Orders by arrival. A preempted request keeps its place, ahead of all that came later."""

    traits = Traits(ages=False)

    def priority(self, request: Request, now: float) -> Priority:
        """The arrival time, in seconds."""
        return request.arrival_time
