"""A request's own grammar as a part of one that allows calls, too."""

import json

import llguidance

from jaxserve.core.grammar import Grammar
from jaxserve.engine.ebnf import as_lark

MAX_EBNF_BESIDE_TOOLS = 4096  # it is translated where other requests wait, in 30 ms


def answer_rules(grammar: Grammar) -> str:
    """A grammar as rules of Lark, in llguidance's dialect, whose `answer` is what it allows.

    Raises:
        InvalidRequest: it is a JSON schema that is not JSON, or long or wrong EBNF.
    """
    if grammar.kind == "choice":
        options = " | ".join(json.dumps(option) for option in json.loads(grammar.source))
        return f"answer: {options}"
    if grammar.kind == "regex":
        return f"answer: /{llguidance.regex_to_lark(grammar.source, '')}/"
    if grammar.kind == "lark":
        return f"answer: %lark {{\n{as_lark(grammar.source, MAX_EBNF_BESIDE_TOOLS)}\n}}"
    return f"answer: {grammar.json_rule()}"
