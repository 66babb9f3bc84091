"""What an answer may look like at all: a grammar that every token of it has to fit."""

import dataclasses
import json

from jaxserve.core.errors import InvalidRequest

KINDS = ("json_object", "json_schema", "regex", "lark", "choice")
MAX_GRAMMAR_CHARS = 2**18


@dataclasses.dataclass(frozen=True)
class Grammar:
    """A constraint on a request's answer, not yet compiled.

    Attributes:
        kind: `json_object` (any JSON object; no source), `json_schema` (the source is a JSON
            schema), `regex`, `lark` (a grammar in llguidance's dialect of Lark), or `choice` (the
            source is a JSON list of strings).
        source: the constraint's text.

    Raises:
        InvalidRequest: there is no such kind, or the source is too long or not what the kind
            asks for. Whether it compiles is only known later.
    """

    kind: str
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidRequest(f"a grammar is one of {', '.join(KINDS)}, not {self.kind!r}")
        if len(self.source) > MAX_GRAMMAR_CHARS:
            raise InvalidRequest(
                f"a grammar may have {MAX_GRAMMAR_CHARS} characters, this one has "
                f"{len(self.source)}"
            )
        if self.kind in ("regex", "lark") and not self.source:
            raise InvalidRequest(f"the {self.kind} grammar is empty")
        if self.kind == "choice" and not _is_choice(self.source):
            raise InvalidRequest("a choice is a list of one or more non-empty strings")

    @classmethod
    def choice(cls, options: list[str]) -> "Grammar":
        """The answer is one of these strings."""
        return cls("choice", json.dumps(options))


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
