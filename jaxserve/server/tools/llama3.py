"""Calls as Llama 3 writes them: an answer that is nothing but JSON."""

from collections.abc import Sequence

from jaxserve.core.grammar import Grammar
from jaxserve.server.tools.call_marks import CallMarks
from jaxserve.server.tools.format import ToolFormat, lark, tool_list
from jaxserve.server.tools.tool import Tool


class Llama3Format(ToolFormat):
    """`{"name": ..., "parameters": {...}}`, maybe after `<|python_tag|>`; several with `;`.

    Source: the JSON-based tool calling of
    https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/.
    """

    marks = CallMarks(pairs={"<|python_tag|>": "", "": ""})
    call_parts = ('{"name": "', '", "parameters": ', "}")
    separator = "; "

    def auto(self, tools: Sequence[Tool], *, is_parallel: bool) -> Grammar:
        """Calls, or text that does not begin as calls may."""
        return lark(
            f"start: {self._calls(is_parallel)} | TEXT?",
            "TEXT: /[^\\s{\\[<](?s:.*)/",
            self._call_rules(tools),
        )

    def instructions(self, tools: Sequence[Tool]) -> str:
        """How to call, and descriptions."""
        return (
            "You have access to the functions below. To call a function, answer with JSON alone, "
            'in the form {"name": function name, "parameters": dictionary of argument name and '
            f"its value}}. Do not use variables.\n\n{tool_list(tools)}"
        )

    def written_result(self, name: str, content: str) -> str:
        """The result by itself."""
        return f"Result of {name or 'the function'}:\n{content}"
