"""Offsets of tokens in a text, whatever they cut in two."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.server.http.logprobs import CompletionLogprobs, TokenNames
from jaxserve.server.http.text_offsets import TextOffsets, prompt_offsets
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer
from jaxserve.tokenizers.detokenizer import IncrementalDetokenizer

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
    ids = range(len(pieces))
    if prompt is None:
        found = TextOffsets()
        return [found.push(tokenizer.token_bytes(i)) for i in ids]
    return prompt_offsets(tokenizer, (tokenizer.BOS, *ids), prompt)


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
    assert offsets(b"<bos>", b"b", prompt="<bos>b") == [0, 0, 5]  # added before one spelled out
    spaced = {"drops_leading_space": True}
    assert offsets(b" a", b" b", prompt="a b", **spaced) == [0, 0, 1]
    assert offsets(b" ", b" a", prompt=" a", **spaced) == [0, 0, 0]  # one that was added
    assert offsets(b" a", b" b", prompt=" a b", **spaced) == [0, 0, 2]  # none was
    assert offsets(b"\xc3\xa9", b"b", prompt="e\u0301b") == [0, 0, 1], "normalised: as it comes"


WORDS = ("a", " b", "<bos>", "<eos>", "日", "é", "\n", "🐈", "  ", "<")


@given(st.data())
def test_the_text_from_an_offset_on_begins_with_the_token(data: st.DataObject):
    """For prompts and answers, whole and cut anywhere, with special tokens shown and skipped."""
    skip, adds_bos = data.draw(st.booleans()), data.draw(st.booleans())
    tokenizer = ByteTokenizer()
    words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=8)
    prompt = tokenizer.encode("".join(data.draw(words)), add_special_tokens=adds_bos)
    given_text = data.draw(st.booleans())
    echo = tokenizer.decode(prompt[1:] if given_text and adds_bos else prompt,
                            skip_special_tokens=False)  # fmt: skip
    answer = data.draw(st.lists(st.sampled_from([*b"a \xe6\x97\xa5\xff<", 256, 257, 300])))
    detokenizer = IncrementalDetokenizer(tokenizer, skip, continues_text=True)
    text = echo + "".join(map(detokenizer.push, answer)) + detokenizer.flush()
    logprobs = CompletionLogprobs(
        TokenNames(tokenizer), 0, echo=echo, skip_special_tokens=skip
    )  # fmt: skip
    scored = [TokenLogprobs(i, 0.0, 1, (), ()) for i in (*prompt, *answer)]
    cut = data.draw(st.integers(0, len(answer)))
    chunks = [
        logprobs.of([prompt[0], *scored[1 : len(prompt)]], scored[len(prompt) :][:cut]),
        logprobs.of([], scored[len(prompt) :][cut:]),
    ]
    found = [at for chunk in chunks for at in chunk["text_offset"]]
    assert found == sorted(found) and len(found) == len(scored)
    for i, (token, at) in enumerate(zip((*prompt, *answer), found, strict=True)):
        is_added = i == 0 and adds_bos and given_text
        is_skipped = i >= len(prompt) and skip and token in tokenizer.special_ids
        piece = tokenizer.token_bytes(token, skip_special_tokens=False)
        if is_added or is_skipped or not piece:
            after = [*found, len(text)][i + 1]
            assert at == after or text[at] == "\ufffd" or not text[at].isascii()
        elif piece.isascii():
            assert text.startswith(piece.decode(), at)
        else:  # a part of the character there
            assert text[at] == "\ufffd" or piece in text[at].encode()
