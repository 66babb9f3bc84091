"""The input of the Responses API as messages of a chat: what callers ask, and items sent back.

An item that a server made is history: whatever fields it has, null or not, it is taken for what
it says. So the items of an answer can be sent back just as `openai` dumps them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxserve.core.errors import InvalidRequest
from jaxserve.tokenizers.call_arguments import read_arguments
from jaxserve.tokenizers.messages import split_content, template_message

_OF_ITEMS = ("type", "id", "status", "phase")  # say nothing to a model

# Tools that another server ran itself: what they were given, and what came of it.
_HOSTED = {
    "code_interpreter_call": (("code",), "outputs"),
    "file_search_call": (("queries",), "results"),
    "web_search_call": (("action",), "results"),
}

Message = dict[str, Any]


def response_messages(
    given: str | Sequence[Mapping[str, Any]], instructions: str | None
) -> list[Message]:
    """The conversation in the chat API's shape.

    The thoughts, the text and the calls of one turn, which are items of their own here, become
    one message.

    Args:
        given: a text, or items.
        instructions: what the model is told first.

    Raises:
        InvalidRequest: an item is of an unknown type, or lacks something; the message says where.
    """
    messages: list[Message] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    for i, item in enumerate(given):
        where, kind = f"input[{i}]", item.get("type") or "message"
        read = _READERS.get(kind) if isinstance(kind, str) else None
        if read is None:
            raise _unknown(kind, f"{where}.type")
        for message in read(item, where):
            _add(messages, message)
    return messages


def _unknown(kind: object, where: str) -> InvalidRequest:
    hint = ": nothing is stored here, send the item itself" if kind == "item_reference" else ""
    return InvalidRequest(f"{where} {kind!r} is not supported{hint}", param=where)


def _message(item: Mapping[str, Any], where: str) -> list[Message]:
    fields = {key: value for key, value in item.items() if key not in _OF_ITEMS}
    if fields.get("role") not in ("user", "assistant", "system", "developer"):
        where = f"{where}.role"
        raise InvalidRequest(f"{where} must be user, assistant, system or developer", param=where)
    return [template_message(fields, where)]


def _reasoning(item: Mapping[str, Any], where: str) -> list[Message]:
    """Thoughts, or their summary; those that another server has encrypted cannot be read."""
    thoughts = ""
    for key in ("content", "summary"):
        given = item.get(key)
        if given and not thoughts:
            thoughts = "".join(split_content(given, f"{where}.{key}", is_history=True))
    return [{"role": "assistant", "content": "", "reasoning_content": thoughts}]


def _call(item: Mapping[str, Any], where: str) -> list[Message]:
    if "arguments" not in item:
        raise InvalidRequest(f"{where}.arguments is required", param=f"{where}.arguments")
    arguments = read_arguments(item["arguments"], f"{where}.arguments")
    return [_turn(item, where, arguments, id_name="call_id")]


def _custom_call(item: Mapping[str, Any], where: str) -> list[Message]:
    return [_turn(item, where, {"input": item.get("input") or ""}, id_name="call_id")]


def _mcp_call(item: Mapping[str, Any], where: str) -> list[Message]:
    """A call that another server has made itself, so it has the result, too."""
    arguments = read_arguments(item.get("arguments"), f"{where}.arguments")
    turn = _turn(item, where, arguments, id_name="id")
    said = item.get("output") or item.get("error") or ""
    result = {"role": "tool", "tool_call_id": item["id"], "content": str(said)}
    return [turn, result]


def _hosted_call(item: Mapping[str, Any], where: str) -> list[Message]:
    """A call of a tool that its server ran, under the tool's name; its result, if it is told."""
    names, output = _HOSTED[item["type"]]
    arguments = {name: item[name] for name in names if item.get(name) is not None}
    call = {**item, "name": item["type"].removesuffix("_call")}
    turn = _turn(call, where, arguments, id_name="id")
    said = json.dumps(item[output], ensure_ascii=False) if item.get(output) else ""
    return [turn, {"role": "tool", "tool_call_id": item["id"], "content": said}]


def _no_message(item: Mapping[str, Any], where: str) -> list[Message]:
    return []


def _result(item: Mapping[str, Any], where: str) -> list[Message]:
    call_id = _string(item, "call_id", where)
    output = item.get("output")
    text, _ = split_content(output or "", f"{where}.output", is_history=True)
    return [{"role": "tool", "tool_call_id": call_id, "content": text}]


_READERS: dict[str, Callable[[Mapping[str, Any], str], list[Message]]] = {
    "message": _message,
    "reasoning": _reasoning,
    "function_call": _call,
    "function_call_output": _result,
    "custom_tool_call": _custom_call,
    "custom_tool_call_output": _result,
    "mcp_call": _mcp_call,
    "mcp_list_tools": _no_message,  # what could be called, not what was said
    **dict.fromkeys(_HOSTED, _hosted_call),
}


def _turn(
    item: Mapping[str, Any], where: str, arguments: Mapping[str, Any], *, id_name: str
) -> Message:
    function = {"name": _string(item, "name", where), "arguments": arguments}
    call = {"id": _string(item, id_name, where), "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _string(item: Mapping[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{where}.{name} must be a non-empty string", param=f"{where}.{name}")
    return value


def _add(messages: list[Message], turn: Message) -> None:
    """Add a message; thoughts, text and calls of one turn are one message."""
    last = messages[-1] if messages else {}
    if turn["role"] != "assistant" or last.get("role") != "assistant":
        messages.append(turn)
    elif "tool_calls" in turn:
        last.setdefault("tool_calls", []).extend(turn["tool_calls"])
    elif "reasoning_content" not in turn and not last["content"] and "tool_calls" not in last:
        last["content"] = turn["content"]
    else:
        messages.append(turn)
