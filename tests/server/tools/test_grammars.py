"""Grammars of calls, as llguidance understands them."""

import json
from typing import Any

import llguidance
import pytest

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.grammar import Grammar
from jaxserve.server.limits import RequestLimits
from jaxserve.server.tools.registry import TOOL_FORMATS, tool_format
from jaxserve.server.tools.tool import read_tools

VOCABULARY = llguidance.LLTokenizer("byte")
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
    several = form.forced(TOOLS, is_parallel=True)
    single = form.forced(TOOLS, is_parallel=False)
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
    several = form.auto(TOOLS, is_parallel=True)
    single = form.auto(TOOLS, is_parallel=False)
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
    grammar = form.forced(tools, is_parallel=False)
    assert accepts(grammar, form.written_call("get_weather", {"city": "Paris", "more": 1}))
    assert not accepts(grammar, form.written_call("get_weather", {"city": "Paris", "more": ""}))


GRAMMARS = [
    (Grammar("json_schema", json.dumps(SCHEMA)), '{"city": "Paris"}', '{"city": 1}'),
    (Grammar("json_schema", json.dumps({"type": "integer"})), "17", "x"),
    (Grammar("regex", "a/b\\/c\n[/]+"), "a/b/c\n//", "a/b"),
    (Grammar("lark", 'start: "}" /x}/ | y{2,3}\ny: "{"'), "{{", "{"),
    (Grammar.choice(['say "é"\n', "b"]), 'say "é"\n', "say"),
]


@pytest.mark.parametrize("name", sorted(TOOL_FORMATS))
@pytest.mark.parametrize(("grammar", "good", "bad"), GRAMMARS)
def test_calls_or_an_answer_of_its_own_grammar(name: str, grammar: Grammar, good: str, bad: str):
    form = tool_format(name, chat_template=None, family="")
    both = form.or_else(grammar, TOOLS, is_parallel=False)
    assert accepts(both, good)
    assert accepts(both, form.written_call("get", {}))
    assert not accepts(both, bad)
    assert not accepts(both, form.written_call("get", {"a": 1}))


def place(name: str) -> dict[str, Any]:
    return {
        "type": "object", "properties": {"at": {"$ref": "#/$defs/place"}}, "required": ["at"],
        "additionalProperties": False, "$defs": {"place": {"const": name}},
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(TOOL_FORMATS))
def test_definitions_stay_apart(name: str):
    form = tool_format(name, chat_template=None, family="")
    tools = read_tools([function(a, place(a)) for a in "bc"], RequestLimits())
    own = Grammar("json_schema", json.dumps(place("a")))
    for both in (
        form.or_else(own, tools, is_parallel=False),
        form.or_else(own, tools, is_parallel=True),
    ):
        assert accepts(both, '{"at": "a"}')
        assert not accepts(both, '{"at": "b"}')
        for tool in "bc":
            for at in "abc":
                written = form.written_call(tool, {"at": at})
                assert accepts(both, written) == (tool == at)


@pytest.mark.parametrize("name", ["llama3", "gemma"])
def test_any_object_or_a_call(name: str):
    form = tool_format(name, chat_template=None, family="")
    both = form.or_else(Grammar("json_object"), TOOLS, is_parallel=True)
    assert accepts(both, '{"a": [1]}')
    assert accepts(both, form.written_call("get_weather", {"city": "Paris"}))
    assert not accepts(both, "[1]")
    with pytest.raises(InvalidRequest, match="either a tool call or JSON"):
        form.or_else(Grammar("lark", 'start: %json {"type": "null"}'), TOOLS, is_parallel=True)


def test_a_schema_that_is_no_json():
    form = tool_format("hermes", chat_template=None, family="")
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        form.or_else(Grammar("json_schema", "{} | call"), TOOLS, is_parallel=False)


@pytest.mark.parametrize(
    "layout",
    [
        '{{"name": "{}", "arguments": {}}}',
        '```json\n{{\n  "name": "{}",\n  "arguments": {}\n}}\n```\nSo.',
    ],
)
def test_calls_without_tags_have_arguments_that_fit(layout: str):
    form = tool_format("hermes", chat_template=None, family="")
    grammar = form.auto(TOOLS, is_parallel=True)
    assert accepts(grammar, "I look. " + layout.format("get_weather", '{"city": "Paris"}'))
    assert accepts(
        grammar, layout.format("get", "{}") + layout.format("get_weather", '{"city": ""}')
    )
    for arguments in ('{"days": 1}', '{"city": 1}', '{"city": "Paris", "more": 1}', "[1]", '"{}"'):
        assert not accepts(grammar, layout.format("get_weather", arguments))
    assert accepts(grammar, layout.format("nobody", "[1]"))
