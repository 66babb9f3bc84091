"""What requests say of tools, checked."""

import json
from typing import Any

import pytest

from jaxserve.core.errors import ConfigError, InvalidRequest
from jaxserve.server.limits import RequestLimits
from jaxserve.server.tools.registry import tool_format
from jaxserve.server.tools.tool import MAX_TOOLS, ToolChoice, read_tool_choice, read_tools

LIMITS = RequestLimits()
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "get", **fields}}


def test_tools():
    given = function(description="Gets", parameters=SCHEMA, strict=True)
    [tool] = read_tools([given], LIMITS)
    assert (tool.name, tool.description, tool.parameters, tool.is_strict) == (
        "get", "Gets", SCHEMA, True,
    )  # fmt: skip
    assert tool.for_template() == function(description="Gets", parameters=SCHEMA)
    flat = {"type": "function", "name": "get", "parameters": None, "strict": None}
    [tool] = read_tools([flat], LIMITS, is_flat=True)
    assert tool.parameters == {"type": "object", "properties": {}, "additionalProperties": False}
    assert read_tools(None, LIMITS) == read_tools([], LIMITS) == ()


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({}, "tools must be a list"),
        ([3], r"tools\[0\] must be an object"),
        ([{"type": "web_search"}], "'web_search' is not supported"),
        ([{"type": "function"}], r"tools\[0\].function must be an object"),
        ([{**function(), "cache": 1}], r"tools\[0\].cache is not supported"),
        ([function(more=1)], r"tools\[0\].function.more is not supported"),
        ([function(name="a b")], r"tools\[0\].function.name must be 1 to 64 letters"),
        ([function(name="a" * 65)], "name must be 1 to 64"),
        ([function(name="get\n")], "name must be 1 to 64"),
        ([function(description=1)], "description must be a string"),
        ([function(strict="yes")], "strict must be true or false"),
        ([function(parameters=[])], "parameters must be a JSON schema"),
        ([function(parameters={"type": "array"})], "parameters.type must be 'object'"),
        ([function(), function()], r"tools\[1\] has the name of an earlier tool: 'get'"),
        ([function()] * (MAX_TOOLS + 1), "at most 128"),
        ([function(parameters={"properties": json.loads("[" * 99 + "]" * 99)})], "too deep"),
        ([function(parameters={"title": "x" * 2**16})], "more than the 65536 allowed"),
    ],
)
def test_bad_tools(tools: Any, message: str):
    with pytest.raises(InvalidRequest, match=message) as caught:
        read_tools(tools, LIMITS)
    assert caught.value.param is not None
    assert caught.value.param.startswith("tools")


def test_all_tools_together_are_limited():
    tools = [function(name=f"f{i}", description="x" * 1000) for i in range(20)]
    with pytest.raises(InvalidRequest, match=r"tools: .* is more than the 20000 allowed"):
        read_tools(tools, RequestLimits(max_prompt_chars=20000))


def test_choices():
    tools = read_tools([function()], LIMITS)
    named = {"type": "function", "function": {"name": "get"}}
    assert read_tool_choice(None, ()) == ToolChoice("none")
    assert read_tool_choice(None, tools) == ToolChoice("auto")
    assert read_tool_choice("required", tools) == ToolChoice("required")
    assert read_tool_choice(named, tools) == ToolChoice("named", "get")
    assert read_tool_choice({"type": "function", "name": "get"}, tools).is_forced
    assert not read_tool_choice("auto", tools).is_forced


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("any", "must be none, auto, required or a tool"),
        (1, "must be a string or an object"),
        ({"type": "allowed_tools"}, "mode must be auto or required"),
        ({"type": "function", "function": {"name": "x"}}, "not among the tools: 'x'"),
        ({"type": "function", "function": []}, "not among the tools: None"),
    ],
)
def test_bad_choices(choice: Any, message: str):
    with pytest.raises(InvalidRequest, match=message):
        read_tool_choice(choice, read_tools([function()], LIMITS))


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_choice_of_no_tools(choice: str):
    with pytest.raises(InvalidRequest, match="there are no tools"):
        read_tool_choice(choice, ())
    assert read_tool_choice("none", ()) == ToolChoice("none")


@pytest.mark.parametrize(
    ("template", "family", "name"),
    [
        ("... <tool_call> ...", "gemma3", "HermesFormat"),
        ("<|start_header_id|>", "llama", "Llama3Format"),
        ("<start_of_turn>", "other", "GemmaFormat"),
        (None, "gemma3", "GemmaFormat"),
        ("<|im_start|>", "llama", "HermesFormat"),
    ],
)
def test_formats_are_guessed(template: str | None, family: str, name: str):
    assert type(tool_format("auto", chat_template=template, family=family)).__name__ == name


def test_unknown_format():
    with pytest.raises(ConfigError, match="there are: auto, hermes, llama3, gemma"):
        tool_format("mistral", chat_template=None, family="")
