"""Calls as Hermes and Qwen write them: JSON between tags, or in a fence, anywhere in the answer."""

import json
from collections.abc import Sequence

from jaxserve.core.grammar import Grammar
from jaxserve.server.tools.call_marks import CallMarks
from jaxserve.server.tools.format import ToolFormat, arguments_schema, lark, tool_list
from jaxserve.server.tools.tool import Tool


class HermesFormat(ToolFormat):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, several in a row.

    Source: https://github.com/NousResearch/Hermes-Function-Calling, and the chat templates of
    Qwen 2.5 and 3. SmolLM2, whose list of calls stands between one pair of tags, is read too.

    Qwen2.5-Coder has the same template, and seldom keeps to it: it writes calls between the tags
    that the tools stood between, in fences, or as an answer of JSON alone. These are calls, too,
    unless the request's own grammar shapes the answer.
    """

    enforced_marks = CallMarks(pairs={"<tool_call>": "</tool_call>"}, anywhere=True)
    auto_marks = CallMarks(
        pairs={**enforced_marks.pairs, "```json": "```", "```xml": "```", "```": "```", "": ""},
        anywhere=True,
        bare_needs_arguments=True,
        bare_is_exact=True,
    )
    marks = CallMarks(
        pairs={**auto_marks.pairs, "<tools>": "</tools>"},
        anywhere=True,
        bare_needs_arguments=True,
    )
    call_parts = ('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>")
    separator = "\n"

    def auto(self, tools: Sequence[Tool], *, is_parallel: bool) -> Grammar:
        """Free text, in which a call follows a tag, and arguments that fit what begins a call."""
        [opener] = self.enforced_marks.openers
        bare = "".join(f" | bare_{i} SPACE? arguments_{i} END" for i in range(len(tools)))
        return lark(
            f"start: {'text_call* TEXT' if is_parallel else 'text_call | TEXT'}",
            f"text_call: opener call{bare}",
            f"opener[lazy]: /(?s:.*){opener}/",
            "TEXT: /(?s:.*)/",
            "SPACE: /\\s+/",
            "END: /\\s*\\}/",
            *(_bare_call(i, tool) for i, tool in enumerate(tools)),
            self._call_rules(tools, already=opener),
        )

    def instructions(self, tools: Sequence[Tool]) -> str:
        """Descriptions between tags, and how to call."""
        return (
            "You can call functions to help with the user's request. These are the functions, "
            f"as JSON between <tools></tools>:\n<tools>\n{tool_list(tools)}\n</tools>\n\n"
            "To call a function, write a JSON object with its name and arguments between "
            '<tool_call></tool_call>:\n<tool_call>\n{"name": <function-name>, "arguments": '
            "<arguments-object>}\n</tool_call>"
        )

    def written_result(self, name: str, content: str) -> str:
        """The result between tags."""
        return f"<tool_response>\n{content}\n</tool_response>"


def _bare_call(number: int, tool: Tool) -> str:
    """In Lark, a text up to the arguments of a call without a tag, and these."""
    head = rf'\{{\s*"name"\s*:\s*"{tool.name}"\s*,\s*"arguments"\s*:'
    schema = json.dumps(arguments_schema(tool))
    return f"bare_{number}[lazy]: /(?s:.*){head}/\narguments_{number}: %json {schema}"
