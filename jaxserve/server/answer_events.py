"""What the text of an answer turns out to be, piece by piece: thoughts, content and calls."""

import dataclasses
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class Content:
    """A piece of what is said to the user."""

    text: str


@dataclasses.dataclass(frozen=True)
class Reasoning:
    """A piece of what the model thinks."""

    text: str


@dataclasses.dataclass(frozen=True)
class CallBegin:
    """A tool call begins.

    Attributes:
        index: which of the answer's calls, from 0.
        call_id: names it for the tool's result.
        name: the tool's.
    """

    index: int
    call_id: str
    name: str


@dataclasses.dataclass(frozen=True)
class CallArguments:
    """A piece of a call's arguments, as JSON text."""

    index: int
    text: str


AnswerEvent = Content | Reasoning | CallBegin | CallArguments


class TextReader(Protocol):
    """Reads a text that arrives in pieces; how it is cut makes no difference to what is read."""

    def push(self, text: str) -> list[AnswerEvent]:
        """Take the next piece; what has become certain."""
        ...

    def finish(self, *, is_cut: bool = False) -> list[AnswerEvent]:
        """The text is over; what was held back.

        Args:
            is_cut: it did not end by itself, so the beginning of a marker at its end is no text.
        """
        ...


def held_back(text: str, markers: tuple[str, ...]) -> int:
    """How many characters at the end of a text may be the beginning of one of the markers."""
    longest = 0
    for marker in markers:
        start = text.find(marker[0], max(0, len(text) - len(marker) + 1))
        while start >= 0 and not marker.startswith(text[start:]):
            start = text.find(marker[0], start + 1)
        if start >= 0:
            longest = max(longest, len(text) - start)
    return longest
