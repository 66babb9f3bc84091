"""Follows a model's thinking by its tokens, and ends it when its budget is used up."""

from jaxserve.core.sampling_params import ThinkingBudget
from jaxserve.engine.tail_matcher import TailMatcher


class ThinkingMeter:
    """Counts the tokens between the markers of thinking.

    A model that thinks several times has one budget for all of it.

    Args:
        budget: how many tokens, and the markers.

    Attributes:
        is_inside: whether the answer so far ends in thinking that is not over.
    """

    def __init__(self, budget: ThinkingBudget) -> None:
        self._budget = budget
        self._start = TailMatcher(budget.start_ids)
        self._end = TailMatcher(budget.end_ids)
        self._num_tokens = 0  # thought so far, with what there is of an end marker
        self.is_inside = budget.begins_inside

    def push(self, token_id: int) -> None:
        """Take the answer's next token."""
        if not self.is_inside:
            self.is_inside = self._start.step(token_id)
            return
        self._num_tokens += 1
        if self._end.step(token_id):
            self._num_tokens -= len(self._budget.end_ids)
            self.is_inside = False
            self._start.reset()
            self._end.reset()

    @property
    def next_of_start(self) -> int:
        """The token with which the start marker would go on, or begin."""
        return self._budget.start_ids[self._start.matched]

    @property
    def forced(self) -> int | None:
        """The token that has to come next, since the budget is used up; None if any may."""
        if not self.is_inside or self._num_tokens < self._budget.max_tokens:
            return None
        # What was thought last may be the marker's beginning already.
        return self._budget.end_ids[self._end.matched]
