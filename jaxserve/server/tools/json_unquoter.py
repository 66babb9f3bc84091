"""Reads a JSON string while it is written."""

_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


class JsonUnquoter:
    """Reads a JSON string, from behind its quote on, and gives the text that it stands for.

    Attributes:
        is_over: the closing quote has been read.
    """

    def __init__(self) -> None:
        self.is_over = False
        self._escape = ""  # from the backslash on
        self._high = ""  # the first half of a surrogate pair, whose second may follow

    def push(self, char: str) -> str:
        """The text that has become certain with the next character."""
        if not self._escape:
            if char == "\\":
                self._escape = char
                return ""
            self.is_over = char == '"'
            return self._after_half("" if self.is_over else char)
        self._escape += char
        kind = self._escape[1]
        if kind != "u":
            self._escape = ""
            return self._after_half(_ESCAPES.get(kind, kind))
        if len(self._escape) < 6:
            return ""
        digits, self._escape = self._escape[2:], ""
        try:
            return self._code_unit(int(digits, 16))
        except ValueError:
            return self._after_half(f"\\u{digits}")

    def _code_unit(self, unit: int) -> str:
        if 0xD800 <= unit < 0xDC00:
            lost = self._after_half("")
            self._high = chr(unit)
            return lost
        if 0xDC00 <= unit < 0xE000:
            pair, self._high = self._high + chr(unit), ""
            return pair.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._after_half(chr(unit))

    def _after_half(self, text: str) -> str:
        """A text, after U+FFFD for half of a pair before it."""
        lost, self._high = "\ufffd" if self._high else "", ""
        return lost + text
