"""Texts that an answer must not have, as the token sequences that spell them."""

from collections.abc import Sequence

from jaxserve.tokenizers.base import Tokenizer

_ANCHOR = "\n"  # no tokenizer joins it with the word after it


def spellings(words: Sequence[str], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """How the tokenizer spells each word inside of a text, with and without a space before it.

    Other ways to spell a word are possible but not what a model is trained to write; vLLM takes
    the same two.

    Returns:
        Token sequences, none of them empty, each once.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip(" ") or word
        for text in (bare, f" {bare}"):
            if ids := _inside_of_a_text(text, tokenizer):
                found[ids] = None
    return list(found)


def _inside_of_a_text(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids of a text that follows another, without what begins a text only."""
    if not tokenizer.drops_leading_space:
        return tuple(tokenizer.encode(text, add_special_tokens=False))
    anchor = tokenizer.encode(_ANCHOR, add_special_tokens=False)
    ids = tokenizer.encode(_ANCHOR + text, add_special_tokens=False)
    if ids[: len(anchor)] == anchor:
        return tuple(ids[len(anchor) :])
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def banned_next(sequences: Sequence[tuple[int, ...]], answer: Sequence[int]) -> list[int]:
    """The tokens that would complete one of the sequences at the end of the answer so far."""
    banned = []
    for *before, last in sequences:
        if len(before) <= len(answer) and list(answer[len(answer) - len(before) :]) == before:
            banned.append(last)
    return banned
