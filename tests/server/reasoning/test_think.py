"""Thoughts apart from answers."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.core.errors import ConfigError, InvalidRequest
from jaxserve.core.sampling_params import ThinkingBudget
from jaxserve.server.answer_events import Content, Reasoning
from jaxserve.server.reasoning.registry import think_format
from jaxserve.server.reasoning.think import ThinkFormat, ThinkStream
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer

THINK = ThinkFormat("<think>", "</think>")


def split(*pieces: str, begun: str | None = None) -> tuple[str, str]:
    stream = ThinkStream(THINK, begun=begun)
    events = [event for piece in pieces for event in stream.push(piece)] + stream.finish()
    thoughts = [event.text for event in events if isinstance(event, Reasoning)]
    content = [event.text for event in events if isinstance(event, Content)]
    assert all([*thoughts, *content])
    assert len(thoughts) + len(content) == len(events)
    return "".join(thoughts), "".join(content)


@pytest.mark.parametrize(
    ("text", "begun", "thoughts", "content"),
    [
        ("Hi", None, "", "Hi"),
        ("<think>\nHm. So\n\nwhat?\n</think>\n\nHi", None, "Hm. So\n\nwhat?", "Hi"),
        ("\n<think>Hm</think>Hi </think>", None, "Hm", "Hi </think>"),
        ("Hm\n</think>\nHi", "", "Hm", "Hi"),
        ("</think>Hi", "", "", "Hi"),
        ("Hm <think> </th", "", "Hm <think> </th", ""),
        ("<think>Hm \n", None, "Hm", ""),
        ("<thi", None, "", "<thi"),
        (" Hi <think>Hm</think>", None, "", " Hi <think>Hm</think>"),
        ("", "", "", ""),
        (" go\n</think>\nHi", "\nLet me", " go", "Hi"),
    ],
)
def test_split(text: str, begun: str | None, thoughts: str, content: str):
    assert split(text, begun=begun) == (thoughts, content)
    assert split(*text, begun=begun) == (thoughts, content)


@given(
    parts=st.lists(
        st.sampled_from(["<think>", "</think>", "</", "<", "\n", " ", "Hm", "think>", "é"])
    ),
    cuts=st.lists(st.integers(0, 80), max_size=20),
    begun=st.sampled_from([None, "", "Well"]),
)
def test_cuts_make_no_difference(parts: list[str], cuts: list[int], begun: str | None):
    text = "".join(parts)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    whole = split(text, begun=begun)
    assert split(*pieces, begun=begun) == whole
    if THINK.end not in text:
        assert not (whole[0] and whole[1])


def test_thoughts_are_streamed():
    stream = ThinkStream(THINK, begun="")
    assert stream.push("\nHm, ") == [Reasoning("Hm,")]
    assert stream.push("so <") == [Reasoning(" so")]
    assert stream.push("b>") == [Reasoning(" <b>")]


def test_budget():
    tokenizer = ByteTokenizer()
    budget = THINK.budget(7, tokenizer, begun="\n")
    assert budget == ThinkingBudget(7, tuple(b"<think>"), tuple(b"</think>"), begins_inside=True)
    own_token = ThinkFormat("<bos>", "<eos>").budget(0, tokenizer, begun=None)
    assert (own_token.start_ids, own_token.end_ids) == ((256,), (257,))
    with pytest.raises(InvalidRequest, match="thinking_token_budget"):
        THINK.budget(-1, tokenizer, begun=None)


def test_a_thought_that_has_begun_counts():
    tokenizer = ByteTokenizer()
    for begun, rest in (("", 7), ("\n", 7), ("\nHm", 4), ("a long thought", 0)):
        assert THINK.budget(7, tokenizer, begun=begun).max_tokens == rest


def test_thoughts_that_have_begun():
    assert THINK.begun_in("assistant\n<think>\n") == "\n"
    assert THINK.begun_in("<think>a</think>\n<think>\nLet me") == "\nLet me"
    assert THINK.begun_in("assistant\n<think>\n\n</think>\n\n") is None
    assert THINK.begun_in("assistant") is None


def test_registry():
    assert think_format("think") == THINK
    assert think_format("none") is None
    with pytest.raises(ConfigError, match="there are: none, think"):
        think_format("thnik")
