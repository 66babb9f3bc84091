"""Shortest remaining time first, with TRAIL's limit on preemption."""

import math
from collections.abc import Sequence

from jaxserve.core.request import Request
from jaxserve.scheduling.policies.base import Policy, Traits

PROTECTED_FROM = 0.8  # of the predicted length; TRAIL's C
HYSTERESIS = 0.8  # a newcomer must have less than this much of the other's remaining tokens


class ShortestRemainingFirst(Policy):
    """Orders by predicted remaining answer tokens; short newcomers displace long running requests.

    From TRAIL ("Don't Stop Me Now: Embedding Based Scheduling for LLMs", Shahout et al., 2024):
    to displace a request is cheap while it is young and has little KV, and a waste when it is
    nearly done. From PROTECTED_FROM of its predicted length on it therefore ranks before all
    that have not come so far, and none takes its place. TRAIL measures by the first
    prediction, this by the latest: a request that turns out to be long was not nearly done.

    Predictions move as an answer grows. A newcomer must be shorter by a clear margin, or two
    requests of about the same length would displace each other at every change of mind.
    """

    traits = Traits(reranks=True, wants_predictions=True, displaces=True)

    def priority(self, request: Request, now: float) -> tuple[float, float]:
        """(0 if protected or else 1, predicted remaining answer tokens).

        One that outlived its prediction counts as about to end.
        """
        return self.priorities([request], now)[0]

    def priorities(self, requests: Sequence[Request], now: float) -> Sequence[tuple[float, float]]:
        """`priority` of each."""
        ranks = []
        for request in requests:
            predicted = request.predicted_len
            if predicted is None:
                ranks.append((1.0, math.inf))
                continue
            answer = request.num_tokens - len(request.prompt_token_ids)
            remaining = predicted - answer if predicted > answer + 1 else 1.0
            ranks.append((1.0 if answer < PROTECTED_FROM * predicted else 0.0, remaining))
        return ranks

    def displaces(self, newcomer: Request, running: Request, now: float) -> bool:
        """Whether the running one may be disturbed and the newcomer is clearly shorter."""
        (_, needs), (may_yield, other_needs) = self.priorities([newcomer, running], now)
        return may_yield > 0 and needs < HYSTERESIS * other_needs
