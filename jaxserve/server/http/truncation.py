"""Leaves out the beginning of a conversation that is too long for the model's context."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from jaxserve.server.http.conversation import ConversationPrompt

Message = dict[str, Any]


async def truncated_prompt(
    messages: list[Message],
    render: Callable[[list[Message]], Awaitable[ConversationPrompt]],
    max_tokens: int,
) -> ConversationPrompt:
    """The prompt of as much of a conversation's end as fits; OpenAI's `truncation: auto`.

    What the system says at the beginning stays, and so does what the user said last. What is left
    out ends before a turn of the user's; where that is not enough, before one of the assistant's,
    so that a tool's result is never without its call.

    Args:
        messages: in OpenAI's shape.
        render: makes the prompt of messages.
        max_tokens: of the prompt. If nothing is short enough, the shortest there can be is given.
    """
    prompt = await render(messages)
    if len(prompt.token_ids) <= max_tokens:
        return prompt
    head = next((i for i, m in enumerate(messages) if not _is_system(m)), len(messages))
    starts = _starts(messages, head)
    low, high = 0, len(starts) - 1
    while low <= high:
        middle = (low + high) // 2
        shorter = await render(messages[:head] + messages[starts[middle] :])
        if len(shorter.token_ids) <= max_tokens:
            prompt, high = shorter, middle - 1
        else:
            low = middle + 1
            if middle == len(starts) - 1:
                return shorter
    return prompt


def _is_system(message: Message) -> bool:
    return message["role"] in ("system", "developer")


def _starts(messages: Sequence[Message], head: int) -> list[int]:
    """Where a conversation may begin instead of after its head, ascending."""
    users = [i for i in range(head + 1, len(messages)) if messages[i]["role"] == "user"]
    last = users[-1] if users else head
    assistants = range(last + 1, len(messages))
    return users + [i for i in assistants if messages[i]["role"] == "assistant"]
