"""Messages of a chat as OpenAI's API has them, checked and made ready for a template."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.json_values import is_too_deep

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_STRINGS = ("name", "tool_call_id", "reasoning_content")
_OTHERS = ("role", "content", "tool_calls", "reasoning")


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a chat template gets to see of messages in OpenAI's shape.

    As in transformers and vLLM: a list of text parts becomes one string, lines apart; the content
    that a message with tool calls need not have is an empty string; the arguments of a tool call,
    which the API has as JSON text, are an object, for templates write them with `tojson`; a tool's
    result has the tool's name, which some templates ask for. Fields without a value are left out.

    Args:
        messages: each with "role" and "content"; an assistant's may have "tool_calls" and
            "reasoning_content" (or "reasoning", vLLM's later name), a tool's "tool_call_id".

    Raises:
        InvalidRequest: a field is unknown or has a wrong type, a part of a message is not text,
            or a tool call's arguments are not a JSON object; the message says where.
    """
    chat = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    tools: dict[str, str] = {}  # by the ids of their calls
    for message in chat:
        tools |= {
            c["id"]: c["function"]["name"] for c in message.get("tool_calls", []) if "id" in c
        }
        if message.get("tool_call_id") in tools:
            message.setdefault("name", tools[message["tool_call_id"]])
    return chat


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _error(where, "must be an object")
    given = {key: value for key, value in message.items() if value is not None and value != []}
    unknown = [str(key) for key in given if key not in (*_STRINGS, *_OTHERS)]
    if unknown:
        raise _error(f"{where}.{unknown[0]}", "is not supported")
    role = given.get("role")
    if not isinstance(role, str) or not role:
        raise _error(f"{where}.role", "must be a non-empty string")
    if "reasoning" in given:
        given.setdefault("reasoning_content", given.pop("reasoning"))
    if "content" not in given and "tool_calls" not in given:
        raise _error(f"{where}.content", "is required")
    result: dict[str, Any] = {"role": role, "content": _content(given.get("content", ""), where)}
    for key in _STRINGS:
        if key in given:
            if not isinstance(given[key], str):
                raise _error(f"{where}.{key}", "must be a string")
            result[key] = given[key]
    if "tool_calls" in given:
        if role != "assistant":
            raise _error(f"{where}.tool_calls", "belongs to the assistant's messages only")
        result["tool_calls"] = _tool_calls(given["tool_calls"], f"{where}.tool_calls")
    return result


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _error(f"{where}.content", "must be a string or a list of parts")
    return "\n".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        raise _error(where, 'must be an object with a "type"')
    if kind not in _TEXT_PARTS:
        raise _error(where, f"{kind!r} is not supported: this server reads text only")
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise _error(f"{where}.{_TEXT_PARTS[kind]}", "must be a string")
    return text


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise _error(where, "must be a list")
    return [_tool_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or call.get("type", "function") != "function":
        raise _error(where, "must be an object of the type function")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise _error(f"{where}.function.name", "must be a non-empty string")
    arguments = _arguments(function.get("arguments", ""), f"{where}.function.arguments")
    result = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if call.get("id") is not None:
        if not isinstance(call["id"], str):
            raise _error(f"{where}.id", "must be a string")
        result["id"] = call["id"]
    return result


def _arguments(arguments: Any, where: str) -> Mapping[str, Any]:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise _error(where, f"is not valid JSON: {error}") from error
    if not isinstance(arguments, Mapping):
        raise _error(where, "must be a JSON object, as text")
    if is_too_deep(arguments):
        raise _error(where, "is nested too deep")
    return arguments


def _error(where: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"{where} {problem}", param=where)
