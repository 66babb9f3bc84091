"""Thinking between two markers at the beginning of an answer."""

import dataclasses

from jaxserve.core.sampling_params import ThinkingBudget
from jaxserve.server.answer_events import AnswerEvent, Content, Reasoning, held_back
from jaxserve.tokenizers.base import Tokenizer


@dataclasses.dataclass(frozen=True)
class ThinkFormat:
    """The markers around a model's thoughts.

    Attributes:
        start: before them; chat templates often put it at the end of the prompt.
        end: after them.
    """

    start: str
    end: str

    def begun_in(self, text: str) -> str | None:
        """What a text has of a thought that is not over, or None if it has none."""
        _, start, thought = text.rpartition(self.start)
        return thought if start and self.end not in thought else None

    def budget(self, max_tokens: int, tokenizer: Tokenizer, *, begun: str | None) -> ThinkingBudget:
        """A limit on the thoughts' tokens.

        Args:
            max_tokens: so many at most, those that the prompt has already among them.
            tokenizer: the served model's, which knows the markers' tokens.
            begun: what the prompt has of a thought, behind the start marker; None if it has none.

        Raises:
            InvalidRequest: the limit is negative.
        """
        if begun is not None and begun.strip() and max_tokens >= 0:
            spent = len(tokenizer.encode(begun, add_special_tokens=False))
            max_tokens = max(0, max_tokens - spent)
        return ThinkingBudget(
            max_tokens,
            marker_ids(self.start, tokenizer),
            marker_ids(self.end, tokenizer),
            begins_inside=begun is not None,
        )


def marker_ids(marker: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens of a marker: its own, if it has one, or those of its text."""
    token = tokenizer.token_to_id(marker)
    if token is not None:
        return (token,)
    return tuple(tokenizer.encode(marker, add_special_tokens=False))


class ThinkStream:
    """Tells thoughts from the answer after them.

    There are thoughts only at the beginning: an answer that does not begin with the start marker,
    white space aside, has none, unless the prompt ends with it. White space around the thoughts
    belongs to neither.

    Args:
        markers: what surrounds thoughts.
        begun: what the prompt has of a thought, behind the start marker; None if it has none.
    """

    def __init__(self, markers: ThinkFormat, *, begun: str | None) -> None:
        self._markers = markers
        self._rest = ""
        self._step = self._at_beginning if begun is None else self._thinking
        self._has_thought = bool(begun and begun.strip())
        self._events: list[AnswerEvent] = []

    def push(self, text: str) -> list[AnswerEvent]:
        """Take the next piece; what has become certain."""
        self._rest += text
        return self._run(is_end=False)

    def finish(self, *, is_cut: bool = False) -> list[AnswerEvent]:
        """The text is over; what was held back, but for a marker that a limit cut off."""
        if is_cut and self._step == self._at_beginning and self._rest.strip():
            self._rest = ""  # all that is held back there begins a marker
        elif is_cut and self._step == self._thinking:
            size = held_back(self._rest, (self._markers.end,))
            self._rest = self._rest[: len(self._rest) - size].rstrip()
        return self._run(is_end=True)

    def _run(self, *, is_end: bool) -> list[AnswerEvent]:
        while self._rest and self._step(is_end):
            pass
        events, self._events = self._events, []
        return events

    # Each step takes something off the rest, or says that it needs more text: False.

    def _at_beginning(self, is_end: bool) -> bool:
        text = self._rest.lstrip()
        if text.startswith(self._markers.start):
            self._rest = text.removeprefix(self._markers.start)
            self._step = self._thinking
        elif not is_end and self._markers.start.startswith(text):
            return False
        else:
            self._step = self._answering
        return True

    def _thinking(self, is_end: bool) -> bool:
        end = self._rest.find(self._markers.end)
        if end >= 0:
            self._think(self._rest[:end].rstrip())
            self._rest = self._rest[end + len(self._markers.end) :]
            self._step = self._after_thinking
            return True
        size = 0 if is_end else held_back(self._rest, (self._markers.end,))
        sure = self._rest[: len(self._rest) - size].rstrip()
        self._think(sure)
        self._rest = "" if is_end else self._rest[len(sure) :]
        return False

    def _think(self, text: str) -> None:
        text = text if self._has_thought else text.lstrip()
        if text:
            self._has_thought = True
            self._events.append(Reasoning(text))

    def _after_thinking(self, is_end: bool) -> bool:
        self._rest = self._rest.lstrip()
        if self._rest:
            self._step = self._answering
        return True

    def _answering(self, is_end: bool) -> bool:
        self._events.append(Content(self._rest))
        self._rest = ""
        return True
