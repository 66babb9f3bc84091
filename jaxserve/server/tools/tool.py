"""The tools that a request offers, and whether the model has to use them."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.json_values import is_too_deep
from jaxserve.server.limits import RequestLimits

MAX_TOOLS = 128  # as in OpenAI's API
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
# Hints to caches, which keep what they can anyway, and notes of gateways.
_HINTS = {"cache_control", "provider_specific_fields"}
_FUNCTION_FIELDS = {"name", "description", "parameters", "strict"} | _HINTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tool:
    """A function that the model may call.

    Attributes:
        name: letters, digits, `_` and `-`, at most 64 of them.
        description: what it is good for; may be empty.
        parameters: JSON schema of its arguments, which are an object.
        is_strict: arguments are to fit the schema even if the model need not call it.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    is_strict: bool = False

    def for_template(self) -> dict[str, Any]:
        """The tool as chat templates know it: as in OpenAI's chat API."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": dict(self.parameters),
        }
        return {"type": "function", "function": function}


@dataclasses.dataclass(frozen=True)
class ToolChoice:
    """Whether the model calls a tool.

    Attributes:
        mode: `none`, `auto` (as it likes), `required` (at least one) or `named` (just that one).
        name: of the tool, if it is `named`.
        allowed: names of those that may be called; None for all of them. The model is told of the
            others as well, so that its prompt stays what a cache has.
    """

    mode: str = "none"
    name: str = ""
    allowed: frozenset[str] | None = None

    @property
    def is_forced(self) -> bool:
        """Whether the answer has to be a call."""
        return self.mode in ("required", "named")


def read_tools(given: Any, limits: RequestLimits, *, is_flat: bool = False) -> tuple[Tool, ...]:
    """The tools of a request, checked.

    Args:
        given: a list in OpenAI's shape, or None.
        limits: their parameters have at most `max_grammar_chars` characters each, and all of it
            has at most `max_prompt_chars`.
        is_flat: the shape is that of the responses API, where a tool's name and parameters stand
            beside its type, not under "function".

    Raises:
        InvalidRequest: a tool is malformed, too large, of a type other than a function, or two
            have one name; the message names the field.
    """
    if given is None:
        return ()
    if not isinstance(given, list):
        raise _error("tools", "must be a list")
    if len(given) > MAX_TOOLS:
        raise _error("tools", f"may have at most {MAX_TOOLS} entries, got {len(given)}")
    tools = tuple(_read_tool(tool, f"tools[{i}]", limits, is_flat) for i, tool in enumerate(given))
    names: set[str] = set()
    for i, tool in enumerate(tools):
        if tool.name in names:
            raise _error(f"tools[{i}]", f"has the name of an earlier tool: {tool.name!r}")
        names.add(tool.name)
    size = sum(len(json.dumps(tool.for_template(), ensure_ascii=False)) for tool in tools)
    limits.check("max_prompt_chars", size, "tools")
    return tools


def read_tool_choice(given: Any, tools: Sequence[Tool]) -> ToolChoice:
    """The `tool_choice` of a request; without one it is auto if there are tools, else none.

    Raises:
        InvalidRequest: it is malformed, or names or requires a tool that is not there.
    """
    if given is None:
        return ToolChoice("auto" if tools else "none")
    if isinstance(given, str):
        if given not in ("none", "auto", "required"):
            raise _error("tool_choice", f"must be none, auto, required or a tool, got {given!r}")
        if given != "none" and not tools:
            raise _error("tool_choice", f"is {given!r}, and there are no tools")
        return ToolChoice(given)
    if not isinstance(given, Mapping):
        raise _error("tool_choice", "must be a string or an object")
    if given.get("type") == "allowed_tools":
        return _read_allowed(given, tools)
    if given.get("type") != "function":
        raise _error("tool_choice", f"of the type {given.get('type')!r} is not supported")
    return ToolChoice("named", _read_choice(given, tools, "tool_choice"))


def _read_choice(given: Any, tools: Sequence[Tool], where: str) -> str:
    """The name of a tool that is chosen, in the shape of either API."""
    function = given.get("function", given) if isinstance(given, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if name not in [tool.name for tool in tools]:
        raise _error(where, f"names a function that is not among the tools: {name!r}")
    return str(name)


def _read_allowed(given: Mapping[str, Any], tools: Sequence[Tool]) -> ToolChoice:
    """A choice of some tools: under `allowed_tools` in chat, beside its type in responses."""
    where, choice = "tool_choice", given
    if "allowed_tools" in given:
        where, choice = "tool_choice.allowed_tools", given["allowed_tools"]
    if not isinstance(choice, Mapping) or choice.get("mode") not in ("auto", "required"):
        raise _error(f"{where}.mode", "must be auto or required")
    allowed = choice.get("tools")
    if not isinstance(allowed, list) or not allowed:
        raise _error(f"{where}.tools", "must be a list of one or more of the tools")
    names = (_read_choice(t, tools, f"{where}.tools[{i}]") for i, t in enumerate(allowed))
    return ToolChoice(choice["mode"], allowed=frozenset(names))


def _read_tool(given: Any, where: str, limits: RequestLimits, is_flat: bool) -> Tool:
    if not isinstance(given, Mapping):
        raise _error(where, "must be an object")
    if given.get("type") != "function":
        raise _error(where, f"of the type {given.get('type')!r} is not supported; functions are")
    if is_flat:
        function = {key: value for key, value in given.items() if key != "type"}
    else:
        extra = set(given) - {"type", "function"} - _HINTS
        if extra:
            raise _error(f"{where}.{min(extra)}", "is not supported")
        function, where = given.get("function"), f"{where}.function"
    if not isinstance(function, Mapping):
        raise _error(where, "must be an object")
    extra = set(function) - _FUNCTION_FIELDS
    if extra:
        raise _error(f"{where}.{min(extra)}", "is not supported")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _error(f"{where}.name", "must be 1 to 64 letters, digits, '_' and '-'")
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise _error(f"{where}.description", "must be a string")
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise _error(f"{where}.strict", "must be true or false")
    parameters = _read_parameters(function.get("parameters"), f"{where}.parameters", limits)
    return Tool(
        name=name, description=description or "", parameters=parameters, is_strict=bool(strict)
    )


def _read_parameters(given: Any, where: str, limits: RequestLimits) -> Mapping[str, Any]:
    if given is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(given, Mapping):
        raise _error(where, "must be a JSON schema")
    if given.get("type", "object") != "object":
        raise _error(f"{where}.type", "must be 'object'")
    if is_too_deep(given):
        raise _error(where, "is nested too deep")
    limits.check("max_grammar_chars", len(json.dumps(given, ensure_ascii=False)), where)
    return {"type": "object", **given}


def _error(where: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"{where} {problem}", param=where)
