"""Messages of a chat as OpenAI's API has them, checked and made ready for a template.

What callers write themselves (`system`, `user`) is checked: a field that cannot be applied is
refused. What a server or a tool has written (`assistant`, `tool`) is history. It is taken as it
is, whatever server it came from: a call that was cut off in its arguments, a message without a
content, fields that say nothing to a model.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxserve.core.errors import InvalidRequest
from jaxserve.tokenizers.call_arguments import read_arguments

# Type of a content's part -> where its text is.
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_THOUGHT_PARTS = {
    "thinking": "thinking", "reasoning": "text", "reasoning_text": "text", "summary_text": "text",
    "redacted_thinking": "",
}  # fmt: skip
_STRINGS = ("name", "tool_call_id", "reasoning_content")
_KNOWN = (*_STRINGS, "role", "content", "tool_calls", "reasoning")
# Hints to caches and notes of gateways, which ask nothing of a model.
_HINTS = ("cache_control", "provider_specific_fields")
_HISTORY = ("assistant", "tool", "function")
_NOT_TEXT = ("audio", "images")  # of the answers of models that do not only write


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a chat template gets to see of messages in OpenAI's shape.

    As in transformers and vLLM: a list of text parts becomes one string, lines apart; the content
    that history need not have is an empty string; the arguments of a tool call, which the API has
    as JSON text, are an object (see `read_arguments`), for templates write them with `tojson`; a
    tool's result has the tool's name, which some templates ask for. Fields without a value are
    left out.

    Args:
        messages: each with "role" and "content"; an assistant's may have "tool_calls" and
            "reasoning_content" (or "reasoning", vLLM's later name), a tool's "tool_call_id".

    Raises:
        InvalidRequest: a field has a wrong type, a system's or user's message has one that is
            unknown, or a part of a message is not text; the message says where.
    """
    chat = [template_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    tools: dict[str, str] = {}  # by the ids of their calls
    for message in chat:
        tools |= {
            c["id"]: c["function"]["name"] for c in message.get("tool_calls", []) if "id" in c
        }
        if message.get("tool_call_id") in tools:
            message.setdefault("name", tools[message["tool_call_id"]])
    return chat


def template_message(message: Any, where: str) -> dict[str, Any]:
    """What a chat template gets to see of one message; see `template_messages`.

    Args:
        message: in OpenAI's shape.
        where: it is in the request, for errors.

    Raises:
        InvalidRequest: as `template_messages`.
    """
    if not isinstance(message, Mapping):
        raise _error(where, "must be an object")
    given = {key: value for key, value in message.items() if value is not None and value != []}
    role = given.get("role")
    if not isinstance(role, str) or not role:
        raise _error(f"{where}.role", "must be a non-empty string")
    if "reasoning" in given:
        given.setdefault("reasoning_content", given.pop("reasoning"))
    if role in _HISTORY:
        _settle_history(given, where)
    else:
        _check_own(given, where)
    is_history = role in _HISTORY
    text, thoughts = split_content(given["content"], f"{where}.content", is_history=is_history)
    result: dict[str, Any] = {"role": given["role"], "content": text}
    if thoughts:
        given.setdefault("reasoning_content", thoughts)
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


def _check_own(given: dict[str, Any], where: str) -> None:
    """Refuse fields of a caller's own message that are unknown, or not there."""
    unknown = [str(key) for key in given if key not in (*_KNOWN, *_HINTS)]
    if unknown:
        raise _error(f"{where}.{unknown[0]}", "is not supported")
    if "content" not in given and "tool_calls" not in given:
        raise _error(f"{where}.content", "is required")
    given.setdefault("content", "")


def _settle_history(given: dict[str, Any], where: str) -> None:
    """Bring what other servers, and older ones, call by other names to one form."""
    if given["role"] == "function":
        given["role"] = "tool"
    if "function_call" in given and "tool_calls" not in given:
        given["tool_calls"] = [{"type": "function", "function": given["function_call"]}]
    content = given.get("content") or given.get("refusal") or _transcript(given)
    for name in _NOT_TEXT:
        if not content and given.get(name):
            raise _error(f"{where}.{name}", "is not supported: this server reads text only")
    given["content"] = content or ""


def _transcript(given: Mapping[str, Any]) -> Any:
    audio = given.get("audio")
    return audio.get("transcript") if isinstance(audio, Mapping) else None


def split_content(content: Any, where: str, *, is_history: bool) -> tuple[str, str]:
    """Text and thoughts of a message's content.

    Args:
        content: a string, or a list of parts.
        where: it is in the request, for errors.
        is_history: a server or a tool wrote it, so it may have thoughts, and parts without a text.

    Raises:
        InvalidRequest: it is neither, or a part is not text.
    """
    if isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        raise _error(where, "must be a string or a list of parts")
    texts, thoughts = [], []
    for i, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str):
            raise _error(f"{where}[{i}]", 'must be an object with a "type"')
        if is_history and kind in _THOUGHT_PARTS:
            thoughts += _thoughts(part.get(_THOUGHT_PARTS[kind]))
        elif kind in _TEXT_PARTS:
            texts.append(_part_text(part, kind, f"{where}[{i}]", is_history))
        else:
            raise _error(f"{where}[{i}]", f"{kind!r} is not supported: this server reads text only")
    return "\n".join(texts), "".join(thoughts)


def _part_text(part: Mapping[str, Any], kind: str, where: str, is_history: bool) -> str:
    text = part.get(_TEXT_PARTS[kind])
    if text is None and is_history:
        return ""
    if not isinstance(text, str):
        raise _error(f"{where}.{_TEXT_PARTS[kind]}", "must be a string")
    return text


def _thoughts(given: Any) -> Iterator[str]:
    """All texts of a thought, which some servers divide again."""
    if isinstance(given, str):
        yield given
    elif isinstance(given, list):
        for part in given:
            if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                yield part["text"]


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise _error(where, "must be a list")
    return [_tool_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    kind = (call.get("type") or "function") if isinstance(call, Mapping) else None
    function = call.get(kind) if kind in ("function", "custom") else None
    if not isinstance(function, Mapping):
        raise _error(where, "must be an object of the type function")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise _error(f"{where}.{kind}.name", "must be a non-empty string")
    if kind == "custom":  # a call with one text instead of arguments
        arguments: Mapping[str, Any] = {"input": str(function.get("input") or "")}
    else:
        arguments = read_arguments(function.get("arguments"), f"{where}.function.arguments")
    result = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if call.get("id") is not None:
        if not isinstance(call["id"], str):
            raise _error(f"{where}.id", "must be a string")
        result["id"] = call["id"]
    return result


def _error(where: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"{where} {problem}", param=where)
