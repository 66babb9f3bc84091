"""Calls as Hermes and Qwen write them: JSON between tags, or in a fence, anywhere in the answer."""

from collections.abc import Sequence

from jaxserve.core.grammar import Grammar
from jaxserve.server.tools.call_marks import CallMarks
from jaxserve.server.tools.format import ToolFormat, lark, tool_list
from jaxserve.server.tools.tool import Tool


class HermesFormat(ToolFormat):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, several in a row.

    Source: https://github.com/NousResearch/Hermes-Function-Calling, and the chat templates of
    Qwen 2.5 and 3. SmolLM2, whose list of calls stands between one pair of tags, is read too.

    Qwen2.5-Coder has the same template, and seldom keeps to it: it writes calls between the tags
    that the tools stood between, in fences, or as an answer of JSON alone. These are calls, too,
    where no grammar shapes the answer.
    """

    enforced_marks = CallMarks(pairs={"<tool_call>": "</tool_call>"}, anywhere=True)
    marks = CallMarks(
        pairs={
            **enforced_marks.pairs, "<tools>": "</tools>",
            "```json": "```", "```xml": "```", "```": "```", "": "",
        },
        anywhere=True,
        bare_needs_arguments=True,
    )  # fmt: skip
    call_parts = ('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>")
    separator = "\n"

    def auto(self, tools: Sequence[Tool], *, is_parallel: bool) -> Grammar:
        """Free text, in which a tag has to be followed by a call."""
        [opener] = self.enforced_marks.openers
        return lark(
            f"start: {'text_call* TEXT' if is_parallel else 'text_call | TEXT'}",
            "text_call: opener call",
            f"opener[lazy]: /(?s:.*){opener}/",
            "TEXT: /(?s:.*)/",
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
