"""Ends a stream of text at the first stop string, and never shows a part of one."""

from collections.abc import Sequence

from jaxserve.engine.tail_matcher import TailMatcher


class StopStrings:
    """Watches a growing text for stop strings.

    The text emitted, joined, is the whole text up to the first place at which any stop
    string begins. A tail that may yet become a stop string is held back; no more than that.

    Args:
        stop: the stop strings, none of them empty; with none, everything is emitted at once.
        keep: the stop string that ends the text belongs to it, so nothing is held back.

    Attributes:
        found: the stop string that ended the text.
    """

    def __init__(self, stop: Sequence[str], *, keep: bool = False) -> None:
        self._matchers = [(s, TailMatcher(s)) for s in stop]
        self._keep = keep
        self._held = ""
        self.found: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.found is not None

    def push(self, text: str, *, armed: bool = True) -> str:
        """Take more text; returns what is now certain to come before any stop string.

        Args:
            text: what comes next.
            armed: whether a stop string that is complete with this text ends it. One that began
                earlier may.
        """
        if self.stopped or not self._matchers:
            return "" if self.stopped else text
        pending = self._held + text
        offset = len(self._held)
        for position, char in enumerate(text, start=offset + 1):
            found = [stop for stop, matcher in self._matchers if matcher.step(char)]
            if found and armed:
                # Of several that end here the longest begins first. One that began earlier
                # still but is not complete cannot count: the text stops before it is.
                self.found = max(found, key=len)
                self._held = ""
                return pending[: position if self._keep else position - len(self.found)]
        held = 0 if self._keep else max(matcher.matched for _, matcher in self._matchers)
        self._held = pending[len(pending) - held :]
        return pending[: len(pending) - held]

    def flush(self) -> str:
        """The text is over: what was held back is no stop string after all."""
        held, self._held = self._held, ""
        return held
