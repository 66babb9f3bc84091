"""Grammars of answers that calls and thoughts may be part of."""

import json
import re

from jaxserve.core.grammar import Grammar
from jaxserve.server.reasoning.think import ThinkFormat, marker_ids
from jaxserve.tokenizers.base import Tokenizer

_SLASH = re.compile(r"(\\.)|/", re.DOTALL)


def answer_rules(grammar: Grammar) -> str:
    """A grammar as rules of Lark, in llguidance's dialect, whose `answer` is what it allows."""
    if grammar.kind == "choice":
        options = " | ".join(json.dumps(option) for option in json.loads(grammar.source))
        return f"answer: {options}"
    if grammar.kind == "regex":
        pattern = _SLASH.sub(lambda match: match[1] or r"\/", grammar.source)
        return "answer: /{}/".format(pattern.replace("\n", r"\n"))
    if grammar.kind == "lark":
        return f"answer: %lark {{\n{grammar.source}\n}}"
    schema = grammar.source if grammar.kind == "json_schema" else '{"type": "object"}'
    return f"answer: %json {schema}"


def whole_grammar(rules: str) -> Grammar:
    """The grammar of an answer by itself, given its rules."""
    return Grammar("lark", f"start: answer\n{rules}")


def after_thinking(
    rules: str, markers: ThinkFormat, tokenizer: Tokenizer, *, is_open: bool
) -> Grammar:
    """The grammar of an answer that thoughts may stand before, which it says nothing about.

    Args:
        rules: rules whose `answer` is the answer's.
        markers: what surrounds thoughts.
        tokenizer: the served model's.
        is_open: the prompt has the start marker already, so that the end marker has to come.
    """
    start, end = (_marker(marker, tokenizer) for marker in (markers.start, markers.end))
    is_token = end.startswith("<[")
    if is_token:
        thoughts = f"thoughts: THOUGHTS {end}\nTHOUGHTS: /(?s:.*)/"
    else:
        thoughts = "thoughts[lazy]: /(?s:.*){}/".format(re.escape(markers.end).replace("/", r"\/"))
    whole = "thoughts GAP answer" if is_open else f"answer | {start} thoughts GAP answer"
    return Grammar("lark", f"start: {whole}\n{thoughts}\nGAP: /\\s{{0,4}}/\n{rules}")


def _marker(marker: str, tokenizer: Tokenizer) -> str:
    """A marker in Lark: its token, where that is one without text, or else its text."""
    ids = marker_ids(marker, tokenizer)
    if len(ids) == 1 and ids[0] in tokenizer.special_ids:
        return f"<[{ids[0]}]>"
    return json.dumps(marker)
