"""Tools for models whose chat templates know of none."""

import json
from typing import Any

import pytest

from jaxserve.server.limits import RequestLimits
from jaxserve.server.tools.prompting import with_tools_as_text
from jaxserve.server.tools.registry import TOOL_FORMATS, tool_format
from jaxserve.server.tools.tool import read_tools

TOOLS = read_tools(
    [{"type": "function", "function": {"name": "get", "description": "Gets things"}}],
    RequestLimits(),
)
HERMES = tool_format("hermes", chat_template=None, family="")


def calling(*ids: str) -> dict[str, Any]:
    function = {"name": "get", "arguments": '{"a": 1}'}
    calls = [{"id": i, "type": "function", "function": function} for i in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls}


@pytest.mark.parametrize("name", sorted(TOOL_FORMATS))
def test_descriptions_join_the_system_message(name: str):
    form = tool_format(name, chat_template=None, family="")
    user = {"role": "user", "content": "Hi"}
    [system, same] = with_tools_as_text([user], TOOLS, form)
    assert same == user
    assert system["role"] == "system"
    assert json.dumps(TOOLS[0].for_template()) in system["content"]
    [system, _] = with_tools_as_text([{"role": "developer", "content": "Be"}, user], TOOLS, form)
    assert system["role"] == "developer"
    assert system["content"].startswith("Be\n\n")
    assert "Gets things" in system["content"]


def test_calls_and_results_become_text():
    chat = with_tools_as_text(
        [
            {"role": "user", "content": "Hi"},
            calling("c1", "c2"),
            {"role": "tool", "tool_call_id": "c1", "content": "one"},
            {"role": "tool", "tool_call_id": "c2", "content": "two"},
            {"role": "user", "content": "And?"},
        ],
        (),
        HERMES,
    )
    call = '<tool_call>\n{"name": "get", "arguments": {"a": 1}}\n</tool_call>'
    results = "<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response>"
    assert chat == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": f"{call}\n{call}"},
        {"role": "user", "content": f"{results}\nAnd?"},
    ]


def test_results_name_their_tool_where_the_format_does():
    result = {"role": "tool", "tool_call_id": "c1", "content": "one"}
    llama = tool_format("llama3", chat_template=None, family="")
    chat = with_tools_as_text([calling("c1"), result], (), llama)
    assert chat[1]["content"] == "Result of get:\none"
    [alone] = with_tools_as_text([result], (), llama)
    assert alone["content"] == "Result of the function:\none"
