"""Telling a model of tools whose chat template knows of none."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.server.tools.format import ToolFormat
from jaxserve.server.tools.tool import Tool
from jaxserve.tokenizers.messages import template_messages


def with_tools_as_text(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], calls: ToolFormat
) -> list[dict[str, Any]]:
    """Messages without tool calls and results, which become text in a model's format.

    The tools' descriptions join the system message, calls the assistant's text, and results
    become a user's message, since many templates know only these roles, and want them to take
    turns.

    Args:
        messages: in OpenAI's shape.
        tools: on offer; maybe none, when only the history has calls.
        calls: how the model writes calls.

    Raises:
        InvalidRequest: a message has a wrong shape.
    """
    chat: list[dict[str, Any]] = []
    was_result = False
    for message in template_messages(messages):
        is_result = message["role"] == "tool"
        for call in message.pop("tool_calls", []):
            function = call["function"]
            _add(message, calls.written_call(function["name"], function["arguments"]), "\n")
        if is_result:
            result = calls.written_result(message.get("name", ""), message["content"])
            message = {"role": "user", "content": result}
        if was_result and message["role"] == "user":
            _add(chat[-1], message["content"], "\n")
        else:
            chat.append(message)
        was_result = (is_result or was_result) and message["role"] == "user"
    if tools:
        if not chat or chat[0]["role"] not in ("system", "developer"):
            chat.insert(0, {"role": "system", "content": ""})
        _add(chat[0], calls.instructions(tools), "\n\n")
    return chat


def _add(message: dict[str, Any], text: str, gap: str) -> None:
    message["content"] = f"{message['content']}{gap}{text}" if message["content"] else text
