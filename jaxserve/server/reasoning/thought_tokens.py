"""How many of an answer's tokens are thought."""

from collections.abc import Sequence

from jaxserve.server.reasoning.think import ThinkFormat
from jaxserve.tokenizers.base import Tokenizer


class ThoughtTokens:
    """Counts the tokens between the markers at the beginning of an answer.

    Markers are found by their text, since a model may cut one that is no token of its own in any
    way. A token that has both a part of a marker and a part of the thoughts counts.

    Args:
        markers: what surrounds thoughts.
        tokenizer: the served model's.
        begun: what the prompt has of a thought already, which does not count; None for nothing.

    Attributes:
        count: tokens of thought so far.
    """

    def __init__(self, markers: ThinkFormat, tokenizer: Tokenizer, begun: str | None) -> None:
        self.count = 0
        self._tokenizer = tokenizer
        self._start, self._end = markers.start.encode(), markers.end.encode()
        names = (tokenizer.token_to_id(marker) for marker in (markers.start, markers.end))
        self._silent = tokenizer.special_ids.difference(names)
        self._step = self._at_beginning if begun is None else self._thinking
        self._tail = b""  # what may have the beginning of a marker
        self._borders: list[int] = []  # where in the tail tokens that were counted begin

    def push(self, token_ids: Sequence[int]) -> None:
        """Take the answer's next tokens."""
        for token_id in token_ids:
            if self._step == self._answering:
                return
            if token_id not in self._silent:
                self._step(self._tokenizer.token_bytes(token_id, skip_special_tokens=False))

    def _at_beginning(self, piece: bytes) -> None:
        self._tail = (self._tail + piece).lstrip()
        if self._tail.startswith(self._start):
            rest, self._tail = self._tail[len(self._start) :], b""
            self._step = self._thinking
            self._thinking(rest)
        elif not self._start.startswith(self._tail):
            self._step = self._answering

    def _thinking(self, piece: bytes) -> None:
        if not piece:
            return
        border, text = len(self._tail), self._tail + piece
        self._borders.append(border)
        self.count += 1
        end = text.find(self._end)
        if end >= 0:
            self.count -= sum(border >= end for border in self._borders)
            self._step = self._answering
            return
        self._tail = text[1 - len(self._end) :]
        gone = len(text) - len(self._tail)
        self._borders = [border - gone for border in self._borders if border >= gone]

    def _answering(self, piece: bytes) -> None:
        pass
