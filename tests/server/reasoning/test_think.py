"""Thoughts apart from answers."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.errors import ConfigError, InvalidRequest
from jaxserve.core.sampling_params import ThinkingBudget
from jaxserve.server.answer_events import Content, Reasoning
from jaxserve.server.reasoning.registry import think_format
from jaxserve.server.reasoning.think import ThinkFormat, ThinkStream
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer

THINK = ThinkFormat("<think>", "</think>")


def split(*pieces: str, is_open: bool = False) -> tuple[str, str]:
    stream = ThinkStream(THINK, is_open=is_open)
    events = [event for piece in pieces for event in stream.push(piece)] + stream.finish()
    thoughts = [event.text for event in events if isinstance(event, Reasoning)]
    content = [event.text for event in events if isinstance(event, Content)]
    assert all([*thoughts, *content])
    assert len(thoughts) + len(content) == len(events)
    return "".join(thoughts), "".join(content)


@pytest.mark.parametrize(
    ("text", "is_open", "thoughts", "content"),
    [
        ("Hi", False, "", "Hi"),
        ("<think>\nHm. So\n\nwhat?\n</think>\n\nHi", False, "Hm. So\n\nwhat?", "Hi"),
        ("\n<think>Hm</think>Hi </think>", False, "Hm", "Hi </think>"),
        ("Hm\n</think>\nHi", True, "Hm", "Hi"),
        ("</think>Hi", True, "", "Hi"),
        ("Hm <think> </th", True, "Hm <think> </th", ""),
        ("<think>Hm \n", False, "Hm", ""),
        ("<thi", False, "", "<thi"),
        (" Hi <think>Hm</think>", False, "", " Hi <think>Hm</think>"),
        ("", True, "", ""),
    ],
)
def test_split(text: str, is_open: bool, thoughts: str, content: str):
    assert split(text, is_open=is_open) == (thoughts, content)
    assert split(*text, is_open=is_open) == (thoughts, content)


@settings(deadline=None)
@given(
    parts=st.lists(
        st.sampled_from(["<think>", "</think>", "</", "<", "\n", " ", "Hm", "think>", "é"])
    ),
    cuts=st.lists(st.integers(0, 80), max_size=20),
    is_open=st.booleans(),
)
def test_cuts_make_no_difference(parts: list[str], cuts: list[int], is_open: bool):
    text = "".join(parts)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    whole = split(text, is_open=is_open)
    assert split(*pieces, is_open=is_open) == whole
    if THINK.end not in text:
        assert not (whole[0] and whole[1])


def test_thoughts_are_streamed():
    stream = ThinkStream(THINK, is_open=True)
    assert stream.push("\nHm, ") == [Reasoning("Hm,")]
    assert stream.push("so <") == [Reasoning(" so")]
    assert stream.push("b>") == [Reasoning(" <b>")]


def test_budget():
    tokenizer = ByteTokenizer()
    budget = THINK.budget(7, tokenizer, is_open=True)
    assert budget == ThinkingBudget(7, tuple(b"<think>"), tuple(b"</think>"), begins_inside=True)
    own_token = ThinkFormat("<bos>", "<eos>").budget(0, tokenizer, is_open=False)
    assert (own_token.start_ids, own_token.end_ids) == ((256,), (257,))
    with pytest.raises(InvalidRequest, match="thinking_token_budget"):
        THINK.budget(-1, tokenizer, is_open=False)


def test_open_prompts():
    assert THINK.is_open("assistant\n<think>\n")
    assert not THINK.is_open("assistant\n<think>\n\n</think>\n\n")


def test_registry():
    assert think_format("think") == THINK
    assert think_format("none") is None
    with pytest.raises(ConfigError, match="there are: none, think"):
        think_format("thnik")
