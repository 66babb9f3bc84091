"""A request's own grammar as a part of one that allows calls, too."""

import json

import llguidance

from jaxserve.core.grammar import Grammar


def answer_rules(grammar: Grammar) -> str:
    """A grammar as rules of Lark, in llguidance's dialect, whose `answer` is what it allows.

    Raises:
        InvalidRequest: it is a JSON schema that is not JSON.
    """
    if grammar.kind == "choice":
        options = " | ".join(json.dumps(option) for option in json.loads(grammar.source))
        return f"answer: {options}"
    if grammar.kind == "regex":
        return f"answer: /{llguidance.regex_to_lark(grammar.source, '')}/"
    if grammar.kind == "lark":
        return f"answer: %lark {{\n{grammar.source}\n}}"
    return f"answer: {grammar.json_rule()}"
