"""What an answer may look like at all: a grammar that every token of it has to fit."""

import dataclasses
import json
from typing import Any

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.json_schema import enforceable_schema
from jaxserve.core.plain_values import boolean, string

KINDS = ("json_object", "json_schema", "regex", "lark", "choice")
MAX_GRAMMAR_CHARS = 2**18
# What may stand between two parts of a JSON text: a blank, or a line with its indentation.
DEFAULT_WHITESPACE = r"\x20|\x0A(\x20{0,24}|\x09{0,6})"


@dataclasses.dataclass(frozen=True)
class Grammar:
    """A constraint on a request's answer, not yet compiled.

    Attributes:
        kind: `json_object` (any JSON object; no source), `json_schema` (the source is a JSON
            schema), `regex`, `lark` (a grammar in llguidance's dialect of Lark, or in EBNF), or
            `choice` (the source is a JSON list of strings).
        source: the constraint's text.
        is_strict: of a `json_schema`: refuse what cannot be enforced token by token, such as
            `uniqueItems`; else it is left out, and servers look at the finished answer for it.
        whitespace: of JSON: a regular expression of what may stand between its parts, empty for
            nothing; None as the engine's `json_whitespace` has it.

    Raises:
        InvalidRequest: there is no such kind, or the source is too long or not what the kind
            asks for. Whether it compiles is only known later.
    """

    kind: str
    source: str = ""
    is_strict: bool = False
    whitespace: str | None = None

    def __post_init__(self) -> None:
        string("grammar", self.source)
        boolean("is_strict", self.is_strict)
        if self.whitespace is not None:
            string("whitespace", self.whitespace)
        if self.kind not in KINDS:
            raise InvalidRequest(f"a grammar is one of {', '.join(KINDS)}, not {self.kind!r}")
        if len(self.source) > MAX_GRAMMAR_CHARS:
            raise InvalidRequest(
                f"a grammar may have {MAX_GRAMMAR_CHARS} characters, this one has "
                f"{len(self.source)}"
            )
        if self.kind in ("regex", "lark") and not self.source:
            raise InvalidRequest(f"the {self.kind} grammar is empty")
        if self.whitespace is not None and not self.kind.startswith("json"):
            raise InvalidRequest(f"whitespace is for JSON, not for the kind {self.kind}")
        if self.kind == "choice" and not _is_choice(self.source):
            raise InvalidRequest("a choice is a list of one or more non-empty strings")

    @classmethod
    def choice(cls, options: list[str]) -> "Grammar":
        """The answer is one of these strings."""
        return cls("choice", json.dumps(options))

    def json_rule(self) -> str:
        """A grammar of JSON as an expression of llguidance's Lark: `%json {...}`.

        An engine whose `json_whitespace` is another replaces the `DEFAULT_WHITESPACE` in it.

        Raises:
            InvalidRequest: the schema is not valid, or cannot be enforced.
        """
        schema: Any = {"type": "object"}
        if self.kind == "json_schema":
            try:
                schema = json.loads(self.source)
            except (ValueError, RecursionError) as error:
                raise InvalidRequest(
                    f"the schema is not valid JSON: {error}", param="grammar"
                ) from error
            if not isinstance(schema, dict):
                raise InvalidRequest("a JSON schema is a JSON object", param="grammar")
            schema = enforceable_schema(schema, is_strict=self.is_strict)
        blanks = DEFAULT_WHITESPACE if self.whitespace is None else self.whitespace
        layout = {"whitespace_pattern": blanks} if blanks else {"whitespace_flexible": False}
        own = schema.get("x-guidance")
        schema["x-guidance"] = layout | (own if isinstance(own, dict) else {})
        return f"%json {json.dumps(schema)}"


def _is_choice(source: str) -> bool:
    try:
        options = json.loads(source)
    except ValueError:
        return False
    return (
        isinstance(options, list)
        and bool(options)
        and all(isinstance(option, str) and option for option in options)
    )
