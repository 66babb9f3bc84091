"""Grammars of calls and of answers after thoughts, as llguidance understands them."""

import json
from typing import Any

import llguidance
import pytest

from jaxserve.core.grammar import Grammar
from jaxserve.server.answer_grammar import after_thinking, answer_rules, whole_grammar
from jaxserve.server.limits import RequestLimits
from jaxserve.server.reasoning.think import ThinkFormat
from jaxserve.server.tools.registry import TOOL_FORMATS, tool_format
from jaxserve.server.tools.tool import read_tools
from jaxserve.testing.byte_tokenizer import ByteTokenizer

VOCABULARY = llguidance.LLTokenizer("byte")
THINK = ThinkFormat("<think>", "</think>")
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}


def function(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = read_tools([function("get_weather", SCHEMA), function("get")], RequestLimits())


def accepts(grammar: Grammar, text: str) -> bool:
    assert grammar.kind == "lark"
    matcher = llguidance.LLMatcher(
        VOCABULARY, llguidance.LLMatcher.grammar_from_lark(grammar.source)
    )
    assert not matcher.is_error(), matcher.get_error()
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


@pytest.mark.parametrize("name", sorted(TOOL_FORMATS))
def test_forced_calls(name: str):
    form = tool_format(name, chat_template=None, family="")
    one = form.written_call("get_weather", {"city": "Paris"})
    two = one + form.separator + form.written_call("get", {})
    several = whole_grammar(form.forced_rules(TOOLS, is_parallel=True))
    single = whole_grammar(form.forced_rules(TOOLS, is_parallel=False))
    assert accepts(several, one)
    assert accepts(several, two)
    assert accepts(single, one)
    assert not accepts(single, two)
    for grammar in (several, single):
        assert not accepts(grammar, "")
        assert not accepts(grammar, "Hello")
        assert not accepts(grammar, one[:-2])
        for arguments in ({"days": 1}, {"city": 1}, {"city": "Paris", "more": 1}):
            assert not accepts(grammar, form.written_call("get_weather", arguments))
        assert not accepts(grammar, form.written_call("nobody", {}))


@pytest.mark.parametrize("name", sorted(TOOL_FORMATS))
def test_free_text_or_calls(name: str):
    form = tool_format(name, chat_template=None, family="")
    one = form.written_call("get_weather", {"city": "Paris"})
    two = one + form.separator + form.written_call("get", {})
    several = whole_grammar(form.auto_rules(TOOLS, is_parallel=True))
    single = whole_grammar(form.auto_rules(TOOLS, is_parallel=False))
    assert accepts(several, two)
    assert not accepts(single, two)
    for grammar in (several, single):
        assert accepts(grammar, "")
        assert accepts(grammar, "Hello <b>you</b>,\n{here} are [some] words")
        assert accepts(grammar, one)
        assert not accepts(grammar, form.written_call("get_weather", {"days": 1}))
    if form.marks.anywhere:
        assert accepts(single, f"I look. {one}")
        assert not accepts(single, "I look. <tool_call>no")


def test_open_schemas_stay_open():
    schema = {**SCHEMA, "additionalProperties": {"type": "integer"}}
    tools = read_tools([function("get_weather", schema)], RequestLimits())
    form = tool_format("llama3", chat_template=None, family="")
    grammar = whole_grammar(form.forced_rules(tools, is_parallel=False))
    assert accepts(grammar, form.written_call("get_weather", {"city": "Paris", "more": 1}))
    assert not accepts(grammar, form.written_call("get_weather", {"city": "Paris", "more": ""}))


GRAMMARS = [
    (Grammar("json_object"), '{"a": [1]}', "[1]"),
    (Grammar("json_schema", json.dumps({"type": "integer"})), "17", "x"),
    (Grammar("regex", "a/b\\/c\n[/]+"), "a/b/c\n//", "a/b"),
    (Grammar("lark", 'start: "}" /x}/ | y{2,3}\ny: "{"'), "{{", "{"),
    (Grammar.choice(['say "é"\n', "b"]), 'say "é"\n', "say"),
]


@pytest.mark.parametrize(("grammar", "good", "bad"), GRAMMARS)
def test_thoughts_are_free_and_the_answer_is_not(grammar: Grammar, good: str, bad: str):
    rules = answer_rules(grammar)
    assert accepts(whole_grammar(rules), good)
    assert not accepts(whole_grammar(rules), bad)
    begun = after_thinking(rules, THINK, ByteTokenizer(), is_open=True)
    fresh = after_thinking(rules, THINK, ByteTokenizer(), is_open=False)
    for gap in ("", "\n\n"):
        assert accepts(begun, f"Hm {{\n</th</think>{gap}{good}")
        assert accepts(fresh, f"<think>Hm {{\n</th</think>{gap}{good}")
    assert accepts(fresh, good)
    assert not accepts(begun, "Hm")
    assert not accepts(begun, f"Hm</think>{bad}")
    assert not accepts(fresh, f"<think>Hm</think>{bad}")
    assert not accepts(fresh, f"Hm</think>{good}")
    assert not accepts(begun, f"Hm</think></think>{good}")


def test_markers_that_are_tokens_without_text():
    markers = ThinkFormat("<bos>", "<eos>")
    rules = answer_rules(Grammar.choice(["a"]))
    source = after_thinking(rules, markers, ByteTokenizer(), is_open=False).source
    assert source.startswith("start: answer | <[256]> thoughts GAP answer\n")
    assert "THOUGHTS <[257]>" in source


def test_forced_calls_after_thoughts():
    form = tool_format("hermes", chat_template=None, family="")
    rules = form.forced_rules(TOOLS, is_parallel=True)
    grammar = after_thinking(rules, THINK, ByteTokenizer(), is_open=True)
    call = form.written_call("get", {})
    assert accepts(grammar, f"Shall I? <tool_call>\n</think>\n\n{call}")
    assert not accepts(grammar, call)
