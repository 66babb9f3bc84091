"""What is wrong with a caller's grammar, in the caller's words and places.

llguidance compiles another text than the caller's: a regular expression becomes a rule of Lark, a
schema is rewritten, options are added. Its messages show that text, and places in it.
"""

import re

from llguidance.gbnf_to_lark import GbnfToLarkError

MAX_MESSAGE_CHARS = 500

_PLACE = re.compile(r"(?:at )?(\d+)\((\d+)\): ")
_SNIPPET = re.compile(r"\n\s*\d+ \| .*", re.DOTALL)
_BAD_REGEX = re.compile(
    r'(?:invalid regex ".*?" \(in regex\): )?regex parse error:\n(.*)\nerror: ([^\n]*)', re.DOTALL
)
_REFUSED_REGEX = re.compile(r'invalid regex ".*" \(in regex\): (.*?)(?: in regex /.*)?$', re.DOTALL)
_OF_SCHEMA = "failed to compile JSON schema: "
_PLAIN = (
    ("Unsatisfiable schema: ", "no value fits the schema: "),
    ("Expected f64 for ", "a number is expected for "),
    (" is not present in a registry and retrieving it failed: Default retriever does not fetch "
     "resources", " is not part of the schema, and nothing is fetched"),
    ("lexer error", "this cannot be read; maybe a string or a pattern has no end"),
    ("lookarounds not supported yet; WordUnicode", "look-around such as \\b is not supported"),
    ("lookarounds not supported yet", "look-around is not supported"),
)  # fmt: skip


def explained(kind: str, source: str, message: str) -> str:
    """What is wrong with a grammar, and where.

    Args:
        kind, source: of the grammar; its places are the caller's if it is Lark.
        message: llguidance's.
    """
    message = message.split("\n<state>")[0].strip()  # after it comes its whole state
    if message == "NoExtensionBias":
        return "no text fits it"
    place = _PLACE.match(message)
    text = _SNIPPET.sub("", message[place.end() :] if place else message)
    if bad := _BAD_REGEX.search(text):
        column = _column(bad[1])
        where = f" at its character {column}" if kind == "regex" and column else ""
        inner = _pattern(bad[1])
        whose = "" if kind == "regex" else f"the pattern {inner!r}: " if inner else "a pattern: "
        text = f"{_OF_SCHEMA if _OF_SCHEMA in text else ''}{whose}{bad[2]}{where}"
    elif refused := _REFUSED_REGEX.search(text):
        text = refused[1]
    for theirs, plain in _PLAIN:
        text = text.replace(theirs, plain)
    if _OF_SCHEMA in text:
        text = text.replace(_OF_SCHEMA, "" if kind == "json_schema" else "a schema in it: ")
    elif place and kind == "lark":
        text = f"{_within(source, int(place[1]), int(place[2]))}: {text}"
    return shortened(text)


def explained_ebnf(error: Exception) -> str:
    """What is wrong with a grammar in EBNF, and where, if its translator says so."""
    if not isinstance(error, GbnfToLarkError):
        return shortened(str(error))
    before = error.pos.text[: error.pos.pos]
    line, column = before.count("\n") + 1, len(before.rpartition("\n")[2]) + 1
    problem = str(error).removesuffix(f" at {error.pos}")
    return shortened(f"line {line}, column {column}: {problem}")


def shortened(message: str) -> str:
    """A message that is not too long to be sent."""
    return message if len(message) <= MAX_MESSAGE_CHARS else message[:MAX_MESSAGE_CHARS] + "..."


def _within(source: str, line: int, column: int) -> str:
    """A place in the caller's text; options come after it."""
    return f"line {line}, column {column}" if line <= source.count("\n") + 1 else "at its end"


def _pattern(shown: str) -> str:
    """The pattern that a message shows above its marks."""
    first = shown.partition("\n")[0].strip()
    return first if len(first) <= 100 else ""


def _column(shown: str) -> int | None:
    """The character of a pattern, from 1, under which a message has its first mark."""
    pattern, _, marks = shown.partition("\n")
    if "^" not in marks or "\n" in marks:
        return None  # of several lines
    at, indent = marks.index("^"), len(pattern) - len(pattern.lstrip(" "))
    # A slash ends a pattern in Lark, so that it has been escaped there.
    return at - indent - pattern[indent:at].count("\\/") + 1
