"""Calls as Gemma 3 writes them: JSON, often in a fence, or Python in brackets."""

from collections.abc import Sequence

from jaxserve.core.grammar import Grammar
from jaxserve.server.tools.call_marks import CallMarks
from jaxserve.server.tools.format import ToolFormat, lark, tool_list
from jaxserve.server.tools.tool import Tool


class GemmaFormat(ToolFormat):
    """`{"name": ..., "parameters": {...}}`, or `[get_weather(city="Paris")]`, at the beginning.

    https://ai.google.dev/gemma/docs/capabilities/function-calling shows both for Gemma 3, which
    has no tokens of its own for calls. Both are read, in a fence or not; the model is asked
    for JSON, since a schema says what that may be.
    """

    marks = CallMarks(
        pairs=dict.fromkeys(
            ("```json", "```tool_code", "```tool_call", "```python", "```", ""), "```"
        ),
        has_python_calls=True,
    )
    call_parts = ('{"name": "', '", "parameters": ', "}")
    separator = "\n"

    def auto(self, tools: Sequence[Tool], *, is_parallel: bool) -> Grammar:
        """Calls, or text that does not begin as calls may."""
        return lark(
            f"start: {self._calls(is_parallel)} | TEXT?",
            "TEXT: /[^\\s{\\[`](?s:.*)/",
            self._call_rules(tools),
        )

    def instructions(self, tools: Sequence[Tool]) -> str:
        """How to call, and descriptions."""
        return (
            "You have access to functions. If you decide to invoke any of the functions, you MUST "
            'put it in the format of {"name": function name, "parameters": dictionary of argument '
            "name and its value}. You SHOULD NOT include any other text in the response if you "
            f"call a function.\n\n{tool_list(tools)}"
        )

    def written_result(self, name: str, content: str) -> str:
        """The result in a fence."""
        return f"```tool_output\n{content}\n```"
