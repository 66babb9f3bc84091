"""Shortest job first, by predicted length."""

import math

from jaxserve.core.request import Request
from jaxserve.scheduling.policies.base import Policy, Priority, Traits


class ShortestJobFirst(Policy):
    """Orders by the predicted length of the whole answer; who runs is left in peace.

    As Magnus and S3 use predictions: to choose who starts. A preempted request waits where its
    whole length puts it, the answer so far being work that may have to be done again.
    """

    traits = Traits(wants_predictions=True)

    def priority(self, request: Request, now: float) -> Priority:
        """Predicted answer tokens; a request without a prediction comes last."""
        predicted = request.predicted_len
        return math.inf if predicted is None else predicted
