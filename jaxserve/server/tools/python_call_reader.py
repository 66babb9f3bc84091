"""Reads calls that are Python."""

import ast
import json
from collections.abc import Collection

from jaxserve.server.tools.call_readers import State


class PythonCallReader:
    """A call as in Python, with keywords and literals: `get_weather(city="Paris")`.

    Its arguments become JSON only when all is there.

    Args:
        names: those of the tools.

    Attributes: see `CallReader`.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.state = State.READING
        self.name: str | None = None
        self._chars: list[str] = []
        self._names = names
        self._depth = 0
        self._quote = ""
        self._escaped = False
        self._arguments = ""

    def push(self, char: str) -> bool:
        """Take the next character, which is always the call's."""
        self._chars.append(char)
        if self._quote:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == self._quote:
                self._quote = ""
        elif not self._depth:
            if char == "(" and self.source[:-1] in self._names:
                self._depth = 1
            elif not any(name.startswith(self.source) for name in self._names):
                self.state = State.BROKEN
        elif char in "\"'":
            self._quote = char
        elif char in "([{":
            self._depth += 1
        elif char in ")]}":
            self._depth -= 1
            if not self._depth:
                self._complete()
        return True

    @property
    def source(self) -> str:
        """All characters so far."""
        return "".join(self._chars)

    @property
    def may_close(self) -> bool:
        """Never: it is a call when all of it is there."""
        return False

    def cut(self) -> None:
        """A name that has been read is enough; its arguments are not JSON yet."""
        if self._depth:
            self.name = self.source.partition("(")[0]

    def take_arguments(self) -> str:
        """All arguments, once."""
        text, self._arguments = self._arguments, ""
        return text

    def _complete(self) -> None:
        name, _, rest = self.source.partition("(")
        try:  # under a name of our own: a tool's may have a "-"
            call = ast.parse(f"f({rest}", mode="eval").body
            if not isinstance(call, ast.Call) or call.args:
                raise ValueError("not a call with keywords")
            arguments = {
                keyword.arg or "": ast.literal_eval(keyword.value) for keyword in call.keywords
            }
            if "" in arguments:
                raise ValueError("arguments without a name")
            self._arguments = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            self.state = State.BROKEN
            return
        self.name, self.state = name, State.COMPLETE
