"""Tokens of thought are counted by what they spell."""

import pytest

from jaxserve.server.reasoning.think import ThinkFormat
from jaxserve.server.reasoning.thought_tokens import ThoughtTokens
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer


class Pieces(ByteTokenizer):
    """A tokenizer of given pieces; beside them there are the special tokens, as ever."""

    def __init__(self, pieces: list[str]) -> None:
        super().__init__()
        self.pieces = pieces

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes:
        if token_id >= 256:
            return super().token_bytes(token_id, skip_special_tokens=skip_special_tokens)
        return self.pieces[token_id].encode()


def count(*pieces: str, begun: str | None = None, end: str = "</think>") -> int:
    tokenizer = Pieces(list(pieces))
    thoughts = ThoughtTokens(ThinkFormat("<think>", end), tokenizer, begun)
    for token_id in (*range(len(pieces)), tokenizer.EOS):
        thoughts.push([token_id])
    return thoughts.count


@pytest.mark.parametrize(
    ("pieces", "number"),
    [
        (["<think>", "\n", "Hm", "\n", "</think>", "Yes", "<think>", "x"], 3),
        (["<", "think", ">\n", "Hm", ".</", "think", ">\n", "Yes"], 3),
        (["\n<think>", "</think>", "Yes"], 0),
        (["<think>Hm</think>Yes"], 1),
        (["<think>", "a", "<", "/", "b", "</", "think>"], 4),
        (["<think>", "Hm", "</thi"], 2),
        (["Yes", "<think>", "Hm", "</think>"], 0),
        (["<thin", "g>", "Hm"], 0),
        ([], 0),
    ],
)
def test_what_stands_between_the_markers_counts(pieces: list[str], number: int):
    assert count(*pieces) == number


def test_a_thought_that_the_prompt_has_begun():
    assert count(" go", "</think>", "Yes", begun="Let me") == 1
    assert count("</think>", "Yes", begun="") == 0


def test_markers_that_are_special_tokens():
    tokenizer = ByteTokenizer()
    thoughts = ThoughtTokens(ThinkFormat("<bos>", "<eos>"), tokenizer, None)
    thoughts.push([tokenizer.BOS, *b"Hm", tokenizer.EOS, *b"Yes"])
    assert thoughts.count == 2
