"""Grammars in EBNF, as llama.cpp (GBNF) and xgrammar have them, in llguidance's Lark."""

import re

from llguidance.gbnf_to_lark import gbnf_to_lark

from jaxserve.core.errors import InvalidRequest
from jaxserve.engine.grammar_errors import explained_ebnf

MAX_EBNF_CHARS = 2**14  # its translation takes quadratic time: half a second for so many

_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)


def as_lark(source: str, max_chars: int = MAX_EBNF_CHARS) -> str:
    """A grammar in llguidance's Lark, whichever of the two it is written in, as in vLLM.

    Args:
        source: EBNF, whose rules are `name ::= ...` and begin with `root`; anything else is Lark.
        max_chars: longer EBNF is refused.

    Raises:
        InvalidRequest: it is no valid EBNF, or too long.
    """
    if not is_ebnf(source):
        return source
    if len(source) > max_chars:
        raise InvalidRequest(
            f"grammar: EBNF may have {max_chars} characters here, Lark more", param="grammar"
        )
    try:
        return gbnf_to_lark(source).replace("%llguidance {}", "", 1)
    except Exception as error:  # a parser of callers' text may raise anything
        problem = explained_ebnf(error)
        raise InvalidRequest(f"the grammar cannot be used: {problem}", param="grammar") from error


def is_ebnf(source: str) -> bool:
    """Whether a grammar is written in EBNF."""
    return _RULE.search(source) is not None
