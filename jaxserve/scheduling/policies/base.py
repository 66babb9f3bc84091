"""What a scheduling policy is."""

from typing import Protocol

from jaxserve.core.request import Request

Priority = float | tuple[float, ...]


class Policy(Protocol):
    """Decides who goes first; one method, no state of the scheduler in it.

    The same order serves twice: the smallest priority is admitted first, and the largest is the
    first to lose its pages when they run out.
    """

    def priority(self, request: Request, now: float) -> Priority:
        """Rank of a request: smaller is served first, ties go to the older request.

        Called once each time the request joins the waiting queue, so that a step never has to
        sort the queue. A policy in which waiting improves a request's rank fits this too: with
        linear ageing the order of two requests does not change while both wait.

        Args:
            request: the request that joins the queue.
            now: when it joins, in seconds: its arrival, or the step that preempted it.
        """
        ...
