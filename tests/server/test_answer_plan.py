"""What a request's tools and thoughts make of its prompt, its sampling and its answers."""

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.core.errors import ConfigError, InvalidRequest
from jaxserve.core.grammar import Grammar
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine.grammars import GrammarCompiler
from jaxserve.server.answer_events import AnswerEvent, CallBegin, Content, Reasoning
from jaxserve.server.answer_plan import AnswerFormat, AnswerPlan
from jaxserve.server.context import ServerContext
from jaxserve.server.limits import RequestLimits
from jaxserve.server.reasoning.think import ThinkFormat
from jaxserve.server.tools.tool import ToolChoice, read_tools
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
TOOLS = read_tools(
    [{"type": "function", "function": {"name": name}} for name in ("get", "put")], RequestLimits()
)
USER = [{"role": "user", "content": "Hi"}]
CALL = '<tool_call>\n{"name": "get", "arguments": {}}\n</tool_call>'


def plan(reasoning: str = "none", mode: str = "auto", name: str = "", **fields: Any) -> AnswerPlan:
    form = AnswerFormat.of_model("auto", reasoning, fields.pop("tokenizer", TOKENIZER), "llama")
    return AnswerPlan(
        form=form, tools=fields.pop("tools", TOOLS), choice=ToolChoice(mode, name), **fields
    )


def shaped(plan: AnswerPlan, begun: str | None = None, **params: Any) -> SamplingParams:
    return plan.shaped(SamplingParams(**params), begun)


def knows_tools() -> ByteTokenizer:
    tokenizer = ByteTokenizer()
    template = "{{ tools }}{{ messages }}"
    tokenizer.settings = dataclasses.replace(tokenizer.settings, chat_template=template)
    return tokenizer


def test_templates_get_what_they_know():
    [system, user] = plan().messages(USER)
    assert "get" in system["content"]
    assert user == USER[0]
    assert plan(mode="none").messages(USER) is USER
    knowing = plan(tokenizer=knows_tools())
    assert knowing.messages(USER) is USER
    assert [tool["function"]["name"] for tool in knowing.template_tools()] == ["get", "put"]
    assert plan().template_tools() == []
    assert plan(mode="none", tokenizer=knows_tools()).template_tools() == []


@pytest.mark.parametrize(
    ("fields", "has_grammar"),
    [
        ({}, False), ({"mode": "none"}, False), ({"mode": "required"}, True),
        ({"mode": "named", "name": "get"}, True), ({"is_parallel": False}, True),
        ({"tools": [dataclasses.replace(TOOLS[0], is_strict=True)]}, True),
    ],
)  # fmt: skip
def test_grammars(fields: dict[str, Any], has_grammar: bool):
    params = shaped(plan(**fields))
    assert (params.grammar is not None) == has_grammar
    assert params.thinking is None


def test_a_named_tool_is_the_only_one():
    grammar = shaped(plan(mode="named", name="put")).grammar
    assert grammar is not None
    assert "put" in grammar.source and "get" not in grammar.source


def test_a_grammar_of_its_own():
    own = Grammar.choice(["yes"])
    assert shaped(plan(mode="none"), grammar=own).grammar == own
    both = shaped(plan(), grammar=own).grammar
    assert both is not None and both.kind == "lark" and '"yes"' in both.source
    ebnf = shaped(plan(), grammar=Grammar("lark", 'root ::= "yes"')).grammar
    assert ebnf is not None
    GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size).compile(ebnf)
    # A call that is required leaves no content for it.
    assert shaped(plan(mode="required"), grammar=own) == shaped(plan(mode="required"))


def test_thinking():
    limited = shaped(plan("think", thinking_budget=7), "\n").thinking
    assert limited is not None
    assert (limited.max_tokens, limited.begins_inside) == (7, True)
    free = shaped(plan("think", mode="required")).thinking
    assert free is not None
    assert free.max_tokens > 10**9 and not free.begins_inside
    assert shaped(plan("think")).thinking is None
    assert shaped(plan(thinking_budget=-1)).thinking is None
    with pytest.raises(InvalidRequest, match="no reasoning parser"):
        shaped(plan(thinking_budget=7))
    with pytest.raises(InvalidRequest, match="must not be negative"):
        shaped(plan("think", thinking_budget=-2))


def test_markers_without_text_are_spelled_out():
    assert shaped(plan("think")).skip_special_tokens
    special = plan()
    form = dataclasses.replace(special.form, thoughts=ThinkFormat("<bos>", "<eos>"))
    assert not shaped(dataclasses.replace(special, form=form)).skip_special_tokens


def joined(events: list[AnswerEvent]) -> tuple[str, str, list[str]]:
    return (
        "".join(event.text for event in events if isinstance(event, Reasoning)),
        "".join(event.text for event in events if isinstance(event, Content)),
        [event.name for event in events if isinstance(event, CallBegin)],
    )


def read(plan: AnswerPlan, pieces: list[str], *, is_cut: bool = False) -> list[AnswerEvent]:
    reader = plan.reader(None, SamplingParams())
    events = [event for piece in pieces for event in reader.push(piece)]
    return events + reader.finish(is_cut=is_cut)


@given(
    parts=st.lists(
        st.sampled_from(
            ["<think>", "</think>", "\n", " ", "Hm", CALL, CALL[:30], "</tool_call>", "<", "é"]
        )
    ),
    cuts=st.lists(st.integers(0, 300), max_size=20),
)
def test_cuts_make_no_difference(parts: list[str], cuts: list[int]):
    text = "".join(parts)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    for is_cut in (False, True):
        found = joined(read(plan("think"), [text], is_cut=is_cut))
        assert joined(read(plan("think"), pieces, is_cut=is_cut)) == found


def test_a_limit_cuts_no_markers_into_the_answer():
    text = f"<think>Hm</think>{CALL}"
    for size in range(len(text)):
        thoughts, content, _ = joined(read(plan("think"), [text[:size]], is_cut=True))
        assert content == "" and "Hm".startswith(thoughts)


@pytest.mark.parametrize("option", ["tool_call_parser", "reasoning_parser"])
def test_unknown_parsers(option: str):
    options: dict[str, Any] = {option: "x"}
    with pytest.raises(ConfigError, match=r"no (tool call|reasoning) parser 'x'"):
        ServerContext(**options)
