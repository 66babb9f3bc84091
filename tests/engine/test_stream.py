"""From tokens to text deltas: how an answer ends, and what its last delta says."""

from typing import Any

import pytest

from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.core.request import FinishReason, Request
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine.outputs import TokenDelta
from jaxserve.engine.stream import OutputStream
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer

BOS, EOS = ByteTokenizer.BOS, ByteTokenizer.EOS


def deltas(answer: list[int], **fields: Any) -> list[TokenDelta]:
    """What a stream makes of an answer, up to its last delta."""
    params = SamplingParams(**{"max_tokens": 30, **fields})
    request = Request(request_id="r", prompt_token_ids=[1], params=params, max_tokens=30)
    stream = OutputStream(request, ByteTokenizer(), (EOS,))
    given: list[TokenDelta] = []
    for token in answer:
        given.append(stream.push(token, TokenLogprobs(token, -1.0, 1)))
        if given[-1].finish_reason is not None:
            break
    return given


def text(given: list[TokenDelta]) -> str:
    return "".join(delta.text for delta in given)


@pytest.mark.parametrize(
    ("fields", "written", "cause"),
    [
        ({"stop": ("lo",)}, "hel", "lo"),
        ({"stop": ("lo", "el")}, "h", "el"),
        ({"stop": ("lo",), "include_stop_str_in_output": True}, "hello", "lo"),
        ({"stop": ("l",), "min_tokens": 3}, "hel", "l"),  # only the second one comes late enough
        ({"stop_token_ids": (ord("o"),)}, "hell", ord("o")),
        (
            {"stop_token_ids": (ord("o"),), "include_stop_str_in_output": True},
            "hello", ord("o"),
        ),
        ({}, "hello world", None),
        ({"stop_token_ids": (EOS,)}, "hello world", None),  # it is EOS all the same
        ({"ignore_eos": True, "stop_token_ids": (EOS,)}, "hello world", EOS),
    ],
)  # fmt: skip
def test_how_an_answer_ends(fields: dict[str, Any], written: str, cause: int | str | None):
    given = deltas([*b"hello world", EOS], **fields)
    assert text(given) == written
    assert given[-1].finish_reason is FinishReason.STOP
    assert given[-1].stop_reason == cause
    assert all(delta.stop_reason is None for delta in given[:-1])


def test_a_stop_string_that_is_held_back_has_its_logprobs():
    given = deltas([*b"a stop", EOS], stop=("stop!",))
    assert [delta.text for delta in given] == ["a", " ", "", "", "", "", "stop"]
    assert [[lp.token_id for lp in d.logprobs] for d in given] == [[i] for i in [*b"a stop", EOS]]


def test_a_stop_string_may_begin_before_min_tokens():
    given = deltas([*b"abcdef", EOS], stop=("bcd",), min_tokens=3)
    assert (text(given), len(given)) == ("a", 4)
    given = deltas([*b"abcdef", EOS], stop=("bcd",), min_tokens=4)
    assert text(given) == "abcdef" and given[-1].stop_reason is None


def test_special_tokens_have_text_if_wanted():
    answer = [104, BOS, 105, EOS]
    assert text(deltas(answer)) == "hi"
    assert text(deltas(answer, skip_special_tokens=False)) == "h<bos>i"
    kept = deltas(answer, skip_special_tokens=False, include_stop_str_in_output=True)
    assert text(kept) == "h<bos>i<eos>"


def test_no_more_than_max_tokens():
    given = deltas(list(b"x" * 40), max_tokens=30)
    assert len(given) == 30 and given[-1].finish_reason is FinishReason.LENGTH
    assert given[-1].stop_reason is None
