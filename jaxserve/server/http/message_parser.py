"""The seam between an answer's text and the parts of a chat message."""

from typing import NamedTuple, Protocol


class ToolCallPart(NamedTuple):
    """A piece of a tool call.

    Attributes:
        index: which call of the message.
        id, name: on a call's first piece, else empty.
        arguments: more of the arguments' JSON.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class MessagePart(NamedTuple):
    """A piece of a message: one of the three.

    Attributes:
        content: more of the text.
        reasoning: more of the reasoning before it.
        tool_call: more of a tool call.
    """

    content: str = ""
    reasoning: str = ""
    tool_call: ToolCallPart | None = None


class MessageParser(Protocol):
    """Splits one choice's text, as it comes, into the parts of its message."""

    def push(self, text: str) -> list[MessagePart]:
        """What has become certain with more of the text."""
        ...

    def finish(self, *, is_cut: bool) -> list[MessagePart]:
        """What is left at the text's end, which a limit may have cut off."""
        ...

    def finish_reason(self, reason: str) -> str:
        """Why the message ended, such as `tool_calls`, given why the text did."""
        ...


class PlainText:
    """The text is the message's content."""

    def push(self, text: str) -> list[MessagePart]:
        """All of it."""
        return [MessagePart(content=text)] if text else []

    def finish(self, *, is_cut: bool) -> list[MessagePart]:
        """Nothing."""
        return []

    def finish_reason(self, reason: str) -> str:
        """The engine's reason, unchanged."""
        return reason
