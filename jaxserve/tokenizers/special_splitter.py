"""Finds the names of special tokens in a text."""

import re
from collections.abc import Iterator, Mapping

_MAX_PREFIX = 4


class SpecialTokenSplitter:
    """Cuts a text at special tokens: the leftmost first, of several there the longest.

    Thousands of special tokens are common ("<unused0>" ...), and one regular expression of
    them all is slow to compile and slow on text that nearly matches. So a small expression
    finds where one may begin, and a dictionary says which one it is.

    Args:
        tokens: names (not empty) and ids.
    """

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = dict(tokens)
        self._prefix = min((len(t) for t in self._tokens), default=0)
        self._prefix = min(self._prefix, _MAX_PREFIX)
        lengths: dict[str, set[int]] = {}
        for token in self._tokens:
            lengths.setdefault(token[: self._prefix], set()).add(len(token))
        self._lengths = {p: sorted(n, reverse=True) for p, n in lengths.items()}
        self._starts = re.compile("|".join(re.escape(p) for p in self._lengths))

    def split(self, text: str) -> Iterator[str | int]:
        """The parts of the text in order: a str where it is plain (never empty), else an id."""
        plain = position = 0
        while self._tokens and (start := self._starts.search(text, position)):
            begin = start.start()
            for length in self._lengths[start.group()]:
                token_id = self._tokens.get(text[begin : begin + length])
                if token_id is not None:
                    if plain < begin:
                        yield text[plain:begin]
                    yield token_id
                    plain = position = begin + length
                    break
            else:
                position = begin + 1
        if plain < len(text):
            yield text[plain:]
