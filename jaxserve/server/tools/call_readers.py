"""Reads one call, character by character, and hands its arguments on while they are written."""

import ast
import enum
import json
from collections.abc import Collection
from typing import Protocol


class State(enum.Enum):
    """How far a call has come."""

    READING = "reading"
    COMPLETE = "complete"
    BROKEN = "broken"


class CallReader(Protocol):
    """Reads one call.

    Attributes:
        state: whether it is over, and how.
        name: the tool's, once it and the beginning of the arguments have been read.
        source: all characters so far.
    """

    state: State
    name: str | None

    @property
    def source(self) -> str:
        """All characters so far."""
        ...

    def push(self, char: str) -> None:
        """Take the next character; only while the state is READING."""
        ...

    def take_arguments(self) -> str:
        """The arguments' JSON text since the last time."""
        ...

    def is_valid(self) -> bool:
        """Whether the call is complete, its arguments a JSON object."""
        ...


_SPACE = " \t\r\n"
_ARGUMENT_KEYS = ("arguments", "parameters")
_OTHER_KEYS = ("type", "id")


class JsonCallReader:
    """A call that is an object with a name and arguments: `{"name": ..., "arguments": {...}}`.

    The object itself is read strictly: with other keys, an unknown name, or arguments that are
    not an object it breaks at once, so that an answer that only looks like a call is not held up.
    What is inside the arguments is handed on as it stands.

    Args:
        names: those of the tools.

    Attributes: see `CallReader`.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.state = State.READING
        self.name: str | None = None
        self._chars: list[str] = []
        self._names = names
        self._found_name: str | None = None
        self._keys: set[str] = set()
        self._key = ""
        self._expect = "start"  # what the object's own level goes on with
        self._depth = 0
        self._quoted_from: int | None = None  # inside of a string since there
        self._escaped = False
        self._arguments: tuple[int, int | None] | None = None  # where they are in `source`
        self._taken = 0

    def push(self, char: str) -> None:
        """Take the next character."""
        self._chars.append(char)
        if self._quoted_from is not None:
            self._in_string(char)
        elif self._depth > 1:
            self._in_value(char)
        else:
            self._on_top(char)
        if self.name is None and self._found_name is not None and self._arguments is not None:
            self.name = self._found_name

    @property
    def source(self) -> str:
        """All characters so far."""
        return "".join(self._chars)

    def take_arguments(self) -> str:
        """The arguments' text since the last time; `{}` at the end of a call without any."""
        if self.name is None or self._arguments is None:
            return ""
        start, end = self._arguments
        if start == end:
            return "{}"
        text = "".join(self._chars[start + self._taken : end])
        self._taken += len(text)
        return text

    def is_valid(self) -> bool:
        """Whether the object is whole and valid JSON."""
        if self.state is not State.COMPLETE:
            return False
        try:
            json.loads(self.source)
        except (ValueError, RecursionError):
            return False
        return True

    def _in_string(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            assert self._quoted_from is not None
            text = "".join(self._chars[self._quoted_from :])
            self._quoted_from = None
            if self._depth == 1:
                self._on_string(text)

    def _on_string(self, text: str) -> None:
        """A string on the object's own level is over: a key or a value."""
        try:
            string = json.loads(text)
        except ValueError:
            return self._break()
        if self._expect == "key":
            self._key = "arguments" if string in _ARGUMENT_KEYS else string
            if self._key in self._keys or self._key not in ("name", "arguments", *_OTHER_KEYS):
                return self._break()
            self._keys.add(self._key)
            self._expect = "colon"
            return None
        self._expect = "comma"
        if self._key == "name":
            if string not in self._names:
                return self._break()
            self._found_name = string
        return None

    def _in_value(self, char: str) -> None:
        if char == '"':
            self._quoted_from = len(self._chars) - 1
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            if self._depth == 1:
                self._expect = "comma"
                if self._key == "arguments" and self._arguments is not None:
                    self._arguments = (self._arguments[0], len(self._chars))

    def _on_top(self, char: str) -> None:
        expect = self._expect
        if char in _SPACE and expect != "start":
            if expect == "scalar":
                self._expect = "comma"
        elif expect == "start" and char == "{":
            self._depth, self._expect = 1, "key"
        elif expect == "key" and char == '"':
            self._quoted_from = len(self._chars) - 1
        elif expect == "colon" and char == ":":
            self._expect = "value"
        elif expect == "value":
            self._begin_value(char)
        elif expect in ("comma", "scalar") and char == ",":
            self._expect = "key"
        elif expect in ("comma", "scalar") and char == "}":
            self._complete()
        elif expect != "scalar":
            self._break()

    def _begin_value(self, char: str) -> None:
        wanted = {"name": '"', "arguments": "{"}.get(self._key, char)
        if char != wanted or char in ",:}]":
            return self._break()
        if char == '"':
            self._quoted_from = len(self._chars) - 1
        elif char in "{[":
            self._depth = 2
            if self._key == "arguments":
                self._arguments = (len(self._chars) - 1, None)
        else:
            self._expect = "scalar"
        return None

    def _complete(self) -> None:
        if self._found_name is None:
            return self._break()
        self.state = State.COMPLETE
        if self._arguments is None:
            self._arguments = (0, 0)
        return None

    def _break(self) -> None:
        self.state = State.BROKEN


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

    def push(self, char: str) -> None:
        """Take the next character."""
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

    @property
    def source(self) -> str:
        """All characters so far."""
        return "".join(self._chars)

    def take_arguments(self) -> str:
        """All arguments, once."""
        text, self._arguments = self._arguments, ""
        return text

    def is_valid(self) -> bool:
        """Whether the call is complete; one that is not valid Python broke."""
        return self.state is State.COMPLETE

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
