"""The incremental detokenizer against `decode`, whatever the tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.tokenizers import IncrementalDetokenizer, Tokenizer
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer

TOKENIZERS = ["smollm2", "gemma3", "llama_like", "byte_tokenizer"]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("skip", [True, False])
def test_equals_decode(name: str, skip: bool, request: pytest.FixtureRequest):
    tokenizer: Tokenizer = request.getfixturevalue(name)
    # Tokens of few bytes and special ones would be rare among all; so half of them are those.
    rare = [i for i in range(min(tokenizer.vocab_size, 4000)) if _is_rare(tokenizer, i)]
    ids_of = st.one_of(st.sampled_from(rare), st.integers(0, tokenizer.vocab_size + 1))

    @given(st.lists(ids_of, max_size=40))
    def check(ids: list[int]) -> None:
        stream = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
        pushed = [stream.push(i) for i in ids]
        whole = tokenizer.decode(ids, skip_special_tokens=skip)
        assert "".join(pushed) + stream.flush() == whole
        # What is emitted early stays true: it begins the text of all longer sequences.
        for n in range(len(ids)):
            early = tokenizer.decode(ids[: n + 1], skip_special_tokens=skip)
            emitted = "".join(pushed[: n + 1])
            assert early.startswith(emitted)
            assert len(early) - len(emitted) <= 3  # an unfinished character is three bytes at most

    check()


def _is_rare(tokenizer: Tokenizer, token_id: int) -> bool:
    try:
        tokenizer.token_bytes(token_id).decode()
    except UnicodeDecodeError:
        return True
    return token_id in tokenizer.special_ids or tokenizer.token_bytes(token_id) == b" "


@given(st.text())
def test_text_comes_back(text: str):
    tokenizer = ByteTokenizer()
    # Special tokens are shown, since "<bos>" in a text becomes one.
    stream = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    pushed = [stream.push(i) for i in tokenizer.encode(text)]
    assert "".join(pushed) == "<bos>" + text
    assert stream.flush() == ""


@pytest.mark.parametrize(
    ("data", "pushed", "flushed"),
    [
        ("\u20ac".encode(), ["", "", "\u20ac"], ""),
        (b"\xe2\x82A", ["", "", "\ufffdA"], ""),  # a letter proves the character broken
        (b"\xff\x80", ["\ufffd", "\ufffd"], ""),  # can begin no character: certain at once
        # Would be a surrogate: certain at the second byte, but Python's codec tells at the third.
        (b"\xed\xa0A", ["", "", "\ufffd\ufffdA"], ""),
        (b"a\xf0\x9f\x98", ["a", "", "", ""], "\ufffd"),
    ],
)
def test_bytes_one_by_one(data: bytes, pushed: list[str], flushed: str):
    stream = IncrementalDetokenizer(ByteTokenizer())
    assert [stream.push(byte) for byte in data] == pushed
    assert stream.flush() == flushed


def test_space_before_the_first_word(llama_like: Tokenizer):
    ids = llama_like.encode("hello world", add_special_tokens=False)
    assert llama_like.decode(ids) == "hello world"
    alone = IncrementalDetokenizer(llama_like)
    assert "".join(map(alone.push, ids)) == "hello world"
    after_prompt = IncrementalDetokenizer(llama_like, continues_text=True)
    assert "".join(map(after_prompt.push, ids)) == " hello world"
