"""How one family of models is told of tools and writes calls: the base of all formats."""

import abc
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxserve.server.tools.call_stream import CallMarks
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
        call_parts: what stands before a call's name, between it and its arguments, and after.
        separator: what stands between two calls.
    """

    marks: ClassVar[CallMarks]
    call_parts: ClassVar[tuple[str, str, str]]
    separator: ClassVar[str]

    def forced_rules(self, tools: Sequence[Tool], *, is_parallel: bool) -> str:
        """Rules of Lark, in llguidance's dialect, whose `answer` is a call of one of these tools.

        Arguments fit the tools' schemas, and have no properties but those named there.

        Args:
            tools: one or more.
            is_parallel: whether several calls may follow each other.
        """
        several = f" ({_quoted(self.separator)} call){{0,{MAX_PARALLEL_CALLS - 1}}}"
        return f"answer: call{several if is_parallel else ''}\n{self._call_rules(tools)}"

    @abc.abstractmethod
    def auto_rules(self, tools: Sequence[Tool], *, is_parallel: bool) -> str:
        """Like `forced_rules`, but the answer may also be, or have, any text that is no call."""

    def _call_rules(self, tools: Sequence[Tool], already: str = "") -> str:
        """Rules of which `call` is one call, without the beginning that is there already."""
        before, between, after = self.call_parts
        rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
        for i, tool in enumerate(tools):
            schema = json.dumps({**_closed(tool.parameters), "x-guidance": _LAYOUT})
            head = _quoted((before + tool.name + between).removeprefix(already))
            rules.append(f"call_{i}: {head} %json {schema} {_quoted(after)}")
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


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema that asks for no other properties than those it names, where that is plain."""
    if any(key in schema for key in _OPEN_ENDED) or "properties" not in schema:
        return dict(schema)
    return {**schema, "additionalProperties": False}


def _quoted(text: str) -> str:
    """A string of Lark, whose escapes are JSON's."""
    return json.dumps(text)
