"""Learning to rank: the order is predicted, the lengths need not be."""

import math

from jaxserve.core.request import Request
from jaxserve.scheduling.policies.base import Policy, Traits


class LearnedRank(Policy):
    """Orders running and waiting requests alike by predicted rank, anew at every step.

    From "Efficient LLM Scheduling by Learning to Rank" (Fu et al., NeurIPS 2024): the shortest
    job goes first if only the order of lengths is right, which is easier to learn than the
    lengths. So nothing here adds or subtracts predictions; any score does that grows with the
    length, as the predictor `rank` learns it. A score is of the whole answer and does not shrink
    as it is produced, which also keeps two requests from displacing each other in turn.

    The paper promotes requests that have starved for a number of steps; here the starvation
    timeout does.
    """

    traits = Traits(wants_predictions=True, displaces=True)

    def priority(self, request: Request, now: float) -> float:
        """The predicted score; a request without one comes last."""
        predicted = request.predicted_len
        return math.inf if predicted is None else predicted

    def displaces(self, newcomer: Request, running: Request, now: float) -> bool:
        """Whether the newcomer's score is the smaller one."""
        return self.priority(newcomer, now) < self.priority(running, now)
