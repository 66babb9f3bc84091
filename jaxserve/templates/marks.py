"""The characters that stand in a template's texts for those of a control token's name."""

import re

# Noncharacters, which Unicode keeps out of texts that are interchanged, then private ones.
MARK_ALPHABET = [chr(c) for c in (*range(0xFDD0, 0xFDF0), *range(0xE400, 0xF000))]
_ESCAPED = re.compile(r"\\\\|\\u[0-9a-f]{4}")  # a backslash, or a character by its number
_UNESCAPED = {f"\\u{ord(mark):04x}": mark for mark in MARK_ALPHABET}


def with_marks_as_they_are(text: str) -> str:
    """A JSON text in ASCII, but with marks in it instead of what JSON has for them."""
    return _ESCAPED.sub(lambda m: _UNESCAPED.get(m[0], m[0]), text)
