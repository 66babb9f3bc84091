"""Least slack against the targets for the first token and for each token after it."""

import dataclasses
from collections.abc import Sequence

from jaxserve.core.request import Request
from jaxserve.scheduling.deadlines import Deadlines
from jaxserve.scheduling.policies.base import Policy, PolicySettings, Traits


class LeastSlack(Policy):
    """The request that must be served soonest to meet its target goes first; see `Deadlines`.

    Deadlines alone collapse under overload: every request is served a little too late. So one
    that misses its TTFT target comes after all that still can make theirs, until the starvation
    timeout. With `shed_overdue` it is given up, if it has no token. A request that is due
    within half its TTFT target displaces a running one that missed its own, or is so far ahead
    of its deadline that it can be away for a whole TTFT target (Andes, Liu et al., 2024, pauses
    streams that are ahead of their readers, too). It takes the displaced one half that time to
    be in danger itself, so none is displaced at every turn.
    """

    traits = Traits(reranks=True, refreshes=True, displaces=True, sheds=True, counts_service=True)

    def __init__(self, settings: PolicySettings) -> None:
        self.traits = dataclasses.replace(self.traits, sheds=settings.shed_overdue)
        self._deadlines = Deadlines(settings.ttft_target, settings.tpot_target)

    def priority(self, request: Request, now: float) -> tuple[float, float]:
        """(1 if overdue for its TTFT target or else 0, when it is due to be served in seconds)."""
        return self._deadlines.ranks([request], now)[0]

    def priorities(self, requests: Sequence[Request], now: float) -> Sequence[tuple[float, float]]:
        """`priority` of each."""
        return self._deadlines.ranks(requests, now)

    def displaces(self, newcomer: Request, running: Request, now: float) -> bool:
        """Whether the newcomer is in danger, and the running one is lost or far from it."""
        target = self._deadlines.ttft_target(newcomer)
        lost, due = self.priority(newcomer, now)
        if lost or due - now > target / 2:
            return False
        lost, due = self.priority(running, now)
        return bool(lost) or (self._deadlines.has_started(running) and due - now > target)

    def sheds(self, request: Request, now: float) -> bool:
        """Whether no token is there, and none can be there in time."""
        return not self._deadlines.has_started(request) and self.priority(request, now)[0] > 0

    def arrived(self, request: Request, now: float) -> None:
        """Note its deadline."""
        self._deadlines.open(request)

    def served(self, served: Sequence[tuple[Request, int]], now: float) -> None:
        """Note first tokens and the pace."""
        self._deadlines.note(served, now)

    def finished(self, request: Request) -> None:
        """Forget its deadline."""
        self._deadlines.close(request)
