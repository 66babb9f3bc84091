"""Reads calls that are JSON."""

import json
from collections.abc import Collection

from jaxserve.server.tools.call_readers import State
from jaxserve.server.tools.json_unquoter import JsonUnquoter

_SPACE = " \t\r\n"
_ARGUMENT_KEYS = ("arguments", "parameters")
_OTHER_KEYS = ("type", "id")
_NO_TEXT = ")];0123456789.+-"  # JSON in the wrong place rather than what a model goes on to say


class JsonCallReader:
    """A call that is an object with a name and arguments: `{"name": ..., "arguments": {...}}`.

    Up to the beginning of the arguments the object is read strictly: with other keys, an unknown
    name, or arguments that are not an object it breaks at once, so that an answer that only looks
    like a call is not held up. What is inside the arguments is handed on as it stands; a string
    with an object in it, as some models write arguments, is handed on as that object. What comes
    after the arguments is passed over, up to the object's end or to where a text begins.

    Args:
        names: those of the tools.
        needs_arguments: a name alone is no call.
        is_exact: it is no call but with a name, then arguments, and nothing else or escaped.

    Attributes: see `CallReader`.
    """

    def __init__(
        self, names: Collection[str], *, needs_arguments: bool = False, is_exact: bool = False
    ) -> None:
        self._needs_arguments = needs_arguments
        self._is_exact = is_exact
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
        self._scalar = ""
        self._in_arguments = False
        self._unquoter: JsonUnquoter | None = None  # inside of arguments that are a string
        self._arguments: list[str] | None = None  # not handed on yet

    def push(self, char: str) -> bool:
        """Take the next character; whether it is the call's."""
        self._chars.append(char)
        if self._unquoter is not None:
            self._in_quoted_arguments(self._unquoter, char)
        elif self._quoted_from is not None:
            self._keep(char)
            self._in_string(char)
        elif self._depth > 1:
            self._keep(char)
            self._in_value(char)
        elif self.name is not None:
            return self._after_arguments(char)
        else:
            self._on_top(char)
        if self.name is None and self._arguments is not None:
            self.name = self._found_name
        return True

    @property
    def source(self) -> str:
        """All characters so far."""
        return "".join(self._chars)

    @property
    def may_close(self) -> bool:
        """Whether it is a call, outside of its strings."""
        return self.name is not None and self._quoted_from is None and self._unquoter is None

    def cut(self) -> None:
        """A name that has been read is enough, unless there is to be more."""
        if not self._needs_arguments:
            self.name = self._found_name

    def take_arguments(self) -> str:
        """The arguments' text since the last time; `{}` at the end of a call without any."""
        if self.name is None or self._arguments is None:
            return ""
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    def _keep(self, char: str) -> None:
        if self._in_arguments and self._arguments is not None:
            self._arguments.append(char)

    def _in_quoted_arguments(self, unquoter: "JsonUnquoter", char: str) -> None:
        text = unquoter.push(char)
        if unquoter.is_over:
            self._unquoter, self._expect = None, "comma"
            if self._arguments is None:  # an empty string
                self._arguments = ["{}"]
        elif self._arguments is not None:
            self._arguments.append(text)
        elif text.strip():
            if text[0] != "{":
                return self._break()
            self._arguments = [text]
        return None

    def _in_string(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            assert self._quoted_from is not None
            text = "".join(self._chars[self._quoted_from :])
            self._quoted_from = None
            if self._depth == 1 and self.name is None:
                self._on_string(text)

    def _on_string(self, text: str) -> None:
        """A string on the object's own level is over: a key or a value."""
        try:
            string = json.loads(text)
        except ValueError:
            return self._break()
        if self._is_exact and text not in self._exact_strings():
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

    def _exact_strings(self) -> list[str]:
        """What the next string on the object's own level may be."""
        if self._expect != "key":
            return [f'"{name}"' for name in self._names]
        return ['"arguments"'] if self._keys else ['"name"']

    def _in_value(self, char: str) -> None:
        if char == '"':
            self._quoted_from = len(self._chars) - 1
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            if self._depth == 1:
                self._expect = "comma"
                self._in_arguments = False

    def _after_arguments(self, char: str) -> bool:
        """On the object's own level, once it is a call: what is no JSON is no part of it."""
        if char == '"':
            self._quoted_from, self._expect = len(self._chars) - 1, "comma"
        elif char in "{[":
            self._depth, self._expect = 2, "comma"
        elif char == "}":
            self._complete()
        elif char in ",:":
            self._expect = "value"
        elif self._expect == "comma" and char not in _SPACE and char not in _NO_TEXT:
            self._chars.pop()
            self.state = State.COMPLETE
            return False
        elif char in _SPACE and self._expect == "scalar":
            self._expect = "comma"
        elif char not in _SPACE and self._expect == "value":
            self._expect = "scalar"
        return True

    def _on_top(self, char: str) -> None:
        expect = self._expect
        if expect == "scalar":
            self._in_scalar(char)
        elif char in _SPACE and expect != "start":
            pass
        elif expect == "start" and char == "{":
            self._depth, self._expect = 1, "key"
        elif expect == "key" and char == '"':
            self._quoted_from = len(self._chars) - 1
        elif expect == "colon" and char == ":":
            self._expect = "value"
        elif expect == "value":
            self._begin_value(char)
        elif expect == "comma" and char == ",":
            self._expect = "key"
        elif expect == "comma" and char == "}":
            self._complete()
        else:
            self._break()

    def _in_scalar(self, char: str) -> None:
        if char not in _SPACE and char not in ",}":
            self._scalar += char
            if self._key == "arguments" and not "null".startswith(self._scalar):
                self._break()
            return
        self._expect = "comma"
        if self._key == "arguments":
            if self._scalar != "null":
                return self._break()
            self._arguments = ["{}"]
        self._on_top(char)

    def _begin_value(self, char: str) -> None:
        arguments = "{" if self._is_exact else '{"n'
        wanted = {"name": '"', "arguments": arguments}.get(self._key, char)
        if char not in wanted or char in ",:}]":
            return self._break()
        if char == '"' and self._key == "arguments":
            self._unquoter = JsonUnquoter()
        elif char == '"':
            self._quoted_from = len(self._chars) - 1
        elif char in "{[":
            self._depth = 2
            if self._key == "arguments":
                self._in_arguments, self._arguments = True, [char]
        else:
            self._expect, self._scalar = "scalar", char
        return None

    def _complete(self) -> None:
        lacks_arguments = self._needs_arguments and self._arguments is None
        if self._found_name is None or lacks_arguments:
            return self._break()
        self.state = State.COMPLETE
        if self._arguments is None:
            self._arguments = ["{}"]
        return None

    def _break(self) -> None:
        self.state = State.BROKEN
