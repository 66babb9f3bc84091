"""How one family of models is told of tools and writes calls: the base of all formats."""

import abc
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.grammar import Grammar
from jaxserve.core.json_schema import enforceable_schema
from jaxserve.server.tools.call_marks import CallMarks
from jaxserve.server.tools.grammar_rules import answer_rules
from jaxserve.server.tools.tool import Tool

MAX_PARALLEL_CALLS = 32

# A JSON text as Python writes it, which is what models have been shown: no room for endless spaces.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_OPEN_ENDED = (
    "additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames",
    "allOf", "anyOf", "oneOf", "$ref", "if", "not", "minProperties", "dependentSchemas",
)  # fmt: skip


class ToolFormat(abc.ABC):
    """One way to write calls.

    Attributes:
        marks: where calls are in an answer.
        auto_marks: where they are in an answer that `auto` shapes, which knows of no others.
        enforced_marks: where they are in an answer that any other grammar shapes.
        call_parts: what stands before a call's name, between it and its arguments, and after.
        separator: what stands between two calls.
    """

    marks: ClassVar[CallMarks]
    auto_marks: ClassVar[CallMarks]
    enforced_marks: ClassVar[CallMarks]
    call_parts: ClassVar[tuple[str, str, str]]
    separator: ClassVar[str]

    def __init_subclass__(cls) -> None:
        for name in ("auto_marks", "enforced_marks"):
            if name not in vars(cls):
                setattr(cls, name, cls.marks)

    def forced(self, tools: Sequence[Tool], *, is_parallel: bool) -> Grammar:
        """An answer that is a call of one of these tools.

        Arguments fit the tools' schemas, and have no properties but those named there.

        Args:
            tools: one or more.
            is_parallel: whether several calls may follow each other.

        Raises:
            InvalidRequest: all of it is too long for a grammar.
        """
        return lark(f"start: {self._calls(is_parallel)}", self._call_rules(tools))

    def or_else(self, answer: Grammar, tools: Sequence[Tool], *, is_parallel: bool) -> Grammar:
        """An answer that is calls, as `forced` has them, or else of this grammar.

        Where both are JSON from the first character on it is one call at most, since llguidance
        tells them apart as alternatives of one JSON schema only.

        Raises:
            InvalidRequest: it is too long, or has JSON as a part of a grammar of Lark.
        """
        if answer.kind.startswith("json") and not self.marks.anywhere:
            return lark(f"start: {self._json_call_or(answer, tools)}")
        if "%json" in answer.source and not self.marks.anywhere:
            raise InvalidRequest(
                "with this model an answer cannot be either a tool call or JSON of a given form: "
                "set tool_choice to none or required",
                param="tool_choice",
            )
        calls = self._calls(is_parallel)
        return lark(f"start: {calls} | answer", self._call_rules(tools), answer_rules(answer))

    def _json_call_or(self, answer: Grammar, tools: Sequence[Tool]) -> str:
        """In Lark, one call that is a JSON object, or an answer of a JSON grammar."""
        schema = json.loads(answer.json_rule().removeprefix("%json "))
        layout = schema.pop("x-guidance")
        key = self.call_parts[1].strip('", :')
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.name},
                    key: _resource(arguments_schema(tool), i),
                },
                "required": ["name", key],
                "additionalProperties": False,
            }
            for i, tool in enumerate(tools)
        ]
        either = {"anyOf": [*calls, _resource(schema, len(tools))], "x-guidance": layout}
        return f"%json {json.dumps(either)}"

    @abc.abstractmethod
    def auto(self, tools: Sequence[Tool], *, is_parallel: bool) -> Grammar:
        """Calls of these tools or any text; text beside calls, where the format has that."""

    def _calls(self, is_parallel: bool) -> str:
        """In Lark, one call or several."""
        several = f" ({json.dumps(self.separator)} call){{0,{MAX_PARALLEL_CALLS - 1}}}"
        return f"call{several if is_parallel else ''}"

    def _call_rules(self, tools: Sequence[Tool], already: str = "") -> str:
        """Rules of which `call` is one call, without the beginning that is there already."""
        before, between, after = self.call_parts
        rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
        for i, tool in enumerate(tools):
            schema = json.dumps(arguments_schema(tool))
            head = json.dumps((before + tool.name + between).removeprefix(already))
            rules.append(f"call_{i}: {head} %json {schema} {json.dumps(after)}")
        return "\n".join(rules)

    @abc.abstractmethod
    def instructions(self, tools: Sequence[Tool]) -> str:
        """What a model is told whose chat template knows of no tools."""

    def written_call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """An earlier call, as the model should have written it."""
        before, between, after = self.call_parts
        return f"{before}{name}{between}{json.dumps(arguments, ensure_ascii=False)}{after}"

    @abc.abstractmethod
    def written_result(self, name: str, content: str) -> str:
        """A tool's result, for a chat template that knows of none.

        Args:
            name: the tool's; empty if the conversation does not say.
            content: what came of it.
        """


def tool_list(tools: Sequence[Tool]) -> str:
    """The tools' descriptions as JSON, one a line."""
    return "\n".join(json.dumps(tool.for_template(), ensure_ascii=False) for tool in tools)


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """The schema that a call's arguments are held to."""
    try:
        schema = enforceable_schema(_closed(tool.parameters), is_strict=tool.is_strict)
    except InvalidRequest as error:
        raise InvalidRequest(f"the tool {tool.name!r}: {error}", param="tools") from error
    return {**schema, "x-guidance": {**schema.get("x-guidance", {}), **_LAYOUT}}


def _resource(schema: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A schema inside of another, as one of its own, within which its `$ref`s stay."""
    rest = {key: value for key, value in schema.items() if key != "x-guidance"}
    return {"$id": f"urn:schema:{number}", **rest}


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema that asks for no other properties than those it names, where that is plain."""
    if any(key in schema for key in _OPEN_ENDED) or "properties" not in schema:
        return dict(schema)
    return {**schema, "additionalProperties": False}


def lark(*rules: str) -> Grammar:
    """Rules in llguidance's dialect of Lark, whose strings are escaped like JSON's."""
    return Grammar("lark", "\n".join(rules))
