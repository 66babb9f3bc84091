"""Turns what an answer's text is read as into the parts of a chat message."""

from collections.abc import Sequence

from jaxserve.server.answer_events import (
    AnswerEvent,
    CallArguments,
    CallBegin,
    Content,
    Reasoning,
    TextReader,
)
from jaxserve.server.http.message_parser import MessagePart, ToolCallPart


class AnswerParser:
    """Tells content, thoughts and tool calls; see `MessageParser`.

    Args:
        reader: reads the answer.
        with_reasoning: thoughts are part of the message; otherwise they are left out.
    """

    def __init__(self, reader: TextReader, *, with_reasoning: bool = True) -> None:
        self._reader = reader
        self._with_reasoning = with_reasoning
        self._has_calls = False

    def push(self, text: str) -> list[MessagePart]:
        """What has become certain with more of the text."""
        return self._parts(self._reader.push(text))

    def finish(self, *, is_cut: bool) -> list[MessagePart]:
        """What is left at the text's end, which a limit may have cut off."""
        return self._parts(self._reader.finish(is_cut=is_cut))

    def finish_reason(self, reason: str) -> str:
        """`tool_calls` where an answer with some came to its end by itself."""
        return "tool_calls" if reason == "stop" and self._has_calls else reason

    def _parts(self, events: Sequence[AnswerEvent]) -> list[MessagePart]:
        parts: list[MessagePart] = []
        for event in events:
            if isinstance(event, Content):
                parts.append(MessagePart(content=event.text))
            elif isinstance(event, Reasoning):
                if self._with_reasoning:
                    parts.append(MessagePart(reasoning=event.text))
            elif isinstance(event, CallBegin):
                self._has_calls = True
                call = ToolCallPart(event.index, id=event.call_id, name=event.name)
                parts.append(MessagePart(tool_call=call))
            elif isinstance(event, CallArguments):
                call = ToolCallPart(event.index, arguments=event.text)
                parts.append(MessagePart(tool_call=call))
        return parts
