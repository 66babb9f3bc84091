"""Offsets of tokens in a text, whatever they cut in two."""

from collections.abc import Sequence

import pytest

from jaxserve.server.http.text_offsets import TextOffsets
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer

TEXT = "日本語の猫は cute"


class Pieces(ByteTokenizer):
    """A tokenizer of given pieces, with the special tokens of the bytes' one."""

    def __init__(self, pieces: Sequence[bytes], *, drops_leading_space: bool = False) -> None:
        super().__init__()
        self.pieces = pieces
        self.drops_leading_space = drops_leading_space

    def _piece_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id] if token_id < 256 else super()._piece_bytes(token_id)


def offsets(*pieces: bytes, prompt: str | None = None, **options: bool) -> list[int]:
    tokenizer = Pieces(pieces, **options)
    found = TextOffsets(tokenizer)
    ids = range(len(pieces))
    if prompt is None:
        return [found.of(i) for i in ids]
    return [found.of_prompt(i, prompt) for i in (tokenizer.BOS, *ids)]


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
def test_a_token_has_the_offset_of_the_character_that_it_begins_in(width: int):
    data = TEXT.encode()
    owners = [i for i, char in enumerate(TEXT) for _ in char.encode()]
    pieces = [data[i : i + width] for i in range(0, len(data), width)]
    assert offsets(*pieces) == owners[::width]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"a", b"\xe6", b"b"], [0, 1, 2]),  # half a character is one U+FFFD
        ([b"\xe6", b"\x97", b"\xe6", b"\x97", b"\xa5", b"c"], [0, 0, 1, 1, 1, 2]),
        ([b"\xff", b"\xff", b"a"], [0, 1, 2]),
        ([b"\xf0\x9f", b"\x98\x80!", b"?"], [0, 0, 2]),
        ([b"", b"a", b"", b"b"], [0, 0, 1, 1]),
    ],
)
def test_bytes_that_are_no_character(pieces: list[bytes], expected: list[int]):
    assert offsets(*pieces) == expected
    text = b"".join(pieces).decode(errors="replace")
    assert max(expected) < len(text)


def test_a_prompt_s_text_is_what_was_given():
    assert offsets(b"a", b"b", prompt="ab") == [0, 0, 1]  # its BOS is none of it
    assert offsets(b"a", b"b", prompt="<bos>ab") == [0, 5, 6]
    spaced = {"drops_leading_space": True}
    assert offsets(b" a", b" b", prompt="a b", **spaced) == [0, 0, 1]
    assert offsets(b" ", b" a", prompt=" a", **spaced) == [0, 0, 1]


def test_special_tokens_of_an_answer():
    tokenizer = ByteTokenizer()
    for skip, after in ((True, 10), (False, 15)):
        found = TextOffsets(tokenizer, start=10, skip_special_tokens=skip)
        assert [found.of(tokenizer.BOS), found.of(97)] == [10, after]
