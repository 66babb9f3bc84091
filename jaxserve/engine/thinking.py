"""Follows a model's thinking by its tokens, and ends it when its budget is used up."""

from collections.abc import Callable, Sequence

from jaxserve.core.sampling_params import ThinkingBudget
from jaxserve.engine.tail_matcher import TailMatcher


class ThinkingMeter:
    """Counts the tokens between the markers of thinking.

    A model that thinks several times has one budget for all of it.

    Args:
        budget: how many tokens, and the markers.
        token_bytes: the text of a token, special ones spelled out. With it a marker is also known
            by its text: one that has no token of its own may be cut in many ways, such as one
            whose first characters share a token with the space before it.

    Attributes:
        is_inside: whether the answer so far ends in thinking that is not over.
        overshoot: the text behind the marker that ended the thinking, of the same token.
    """

    def __init__(
        self, budget: ThinkingBudget, token_bytes: Callable[[int], bytes] | None = None
    ) -> None:
        self._budget = budget
        self._start = _Marker(budget.start_ids, token_bytes)
        self._end = _Marker(budget.end_ids, token_bytes)
        self._num_tokens = 0  # thought so far, with what there is of an end marker
        self.is_inside = budget.begins_inside
        self.overshoot = b""

    def push(self, token_id: int) -> None:
        """Take the answer's next token."""
        if not self.is_inside:
            self.is_inside = self._start.step(token_id) is not None
            return
        self._num_tokens += 1
        rest = self._end.step(token_id)
        if rest is not None:
            self._num_tokens -= min(self._num_tokens, len(self._budget.end_ids))
            self.is_inside = False
            self.overshoot = rest
            self._start.reset()
            self._end.reset()

    @property
    def next_of_start(self) -> int:
        """The token with which the start marker would go on, or begin."""
        return self._budget.start_ids[self._start.num_ids]

    @property
    def forced(self) -> int | None:
        """The token that has to come next, since the budget is used up; None if any may."""
        if not self.is_inside or self._num_tokens < self._budget.max_tokens:
            return None
        # What was thought last may be the marker's beginning already.
        return self._budget.end_ids[self._end.num_ids]


class _Marker:
    """Watches tokens for a marker, by its ids and by its text."""

    def __init__(self, ids: Sequence[int], token_bytes: Callable[[int], bytes] | None) -> None:
        self._ids = TailMatcher(ids)
        self._token_bytes = token_bytes
        text = b"" if token_bytes is None else b"".join(map(token_bytes, ids))
        self._text = TailMatcher(text) if text else None

    @property
    def num_ids(self) -> int:
        """How many of the marker's tokens there are at the end of what came."""
        return self._ids.matched

    def step(self, token_id: int) -> bytes | None:
        """Take a token; if the marker is complete, what the token has behind it."""
        is_complete = self._ids.step(token_id)
        if self._text is not None and self._token_bytes is not None:
            piece = self._token_bytes(token_id)
            for i, byte in enumerate(piece, 1):
                if self._text.step(byte):
                    return piece[i:]
        return b"" if is_complete else None

    def reset(self) -> None:
        """Forget what came."""
        self._ids.reset()
        if self._text is not None:
            self._text.reset()
