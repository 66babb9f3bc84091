"""Ends a stream of text at the first stop string, and never shows a part of one."""

from collections.abc import Sequence


class StopStrings:
    """Watches a growing text for stop strings.

    The text emitted, joined, is the whole text up to the first place at which any stop
    string begins. A tail that may yet become a stop string is held back; no more than that.

    Finding the tail is the Knuth-Morris-Pratt automaton of each stop string: constant time
    per character, however the text is cut into pushes.

    Args:
        stop: the stop strings, none of them empty; with none, everything is emitted at once.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._matchers = [_Matcher(s) for s in stop]
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take more text; returns what is now certain to come before any stop string."""
        if self.stopped or not self._matchers:
            return "" if self.stopped else text
        pending = self._held + text
        offset = len(self._held)
        for position, char in enumerate(text, start=offset + 1):
            ends = [m.length for m in self._matchers if m.step(char)]
            if ends:
                # Of several that end here the longest begins first. One that began earlier
                # still but is not complete cannot count: the text stops before it is.
                self.stopped = True
                self._held = ""
                return pending[: position - max(ends)]
        keep = max(m.matched for m in self._matchers)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]

    def flush(self) -> str:
        """The text is over: what was held back is no stop string after all."""
        held, self._held = self._held, ""
        return held


class _Matcher:
    """How many characters of one stop string the text ends with."""

    def __init__(self, stop: str) -> None:
        self.length = len(stop)
        self.matched = 0
        self._stop = stop
        self._fallback = [0] * len(stop)  # [i]: longest border of stop[: i + 1]
        border = 0
        for i in range(1, len(stop)):
            while border and stop[i] != stop[border]:
                border = self._fallback[border - 1]
            border += stop[i] == stop[border]
            self._fallback[i] = border

    def step(self, char: str) -> bool:
        """Take one character; True when the stop string is complete."""
        while self.matched and char != self._stop[self.matched]:
            self.matched = self._fallback[self.matched - 1]
        self.matched += char == self._stop[self.matched]
        return self.matched == self.length
