"""The splitter against trying every token at every place."""

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.tokenizers.special_splitter import SpecialTokenSplitter


def oracle(text: str, tokens: dict[str, int]) -> list[str | int]:
    parts: list[str | int] = []
    plain, at = "", 0
    while at < len(text):
        here = [t for t in tokens if text.startswith(t, at)]
        if not here:
            plain, at = plain + text[at], at + 1
            continue
        longest = max(here, key=len)
        parts += [plain] if plain else []
        parts.append(tokens[longest])
        plain, at = "", at + len(longest)
    return parts + ([plain] if plain else [])


@given(st.text("<a|>", max_size=30), st.sets(st.text("<a|>", min_size=1, max_size=7), max_size=6))
def test_leftmost_longest(text: str, names: set[str]):
    tokens = {name: i for i, name in enumerate(sorted(names))}
    assert list(SpecialTokenSplitter(tokens).split(text)) == oracle(text, tokens)
