"""The messages of a request, and what the model gets to read of them."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from jaxserve.core.errors import InvalidRequest
from jaxserve.server.answer_plan import AnswerFormat, AnswerPlan
from jaxserve.server.context import ServerContext
from jaxserve.server.prompts import chat_prompt

# What is in a message is checked by `template_messages`, whichever API it came by.
Messages = Annotated[list[dict[str, Any]], Field(min_length=1)]


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
# By which templates are told whether to let a model think.
_SWITCHES = ("enable_thinking", "thinking")


@dataclasses.dataclass(frozen=True)
class ConversationPrompt:
    """What a model goes on from.

    Attributes:
        token_ids: the prompt.
        begun: what it has of a thought that is not over, as some templates begin answers, or as
            a message that is continued does; None if there is none, or nobody would know.
    """

    token_ids: list[int]
    begun: str | None = None


async def conversation_prompt(
    messages: list[dict[str, Any]],
    plan: AnswerPlan,
    context: ServerContext,
    *,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | None = None,
    variables: Mapping[str, Any] | None = None,
    effort: str | None = None,
) -> ConversationPrompt:
    """The prompt of a conversation, its tools included.

    Args:
        messages: in OpenAI's shape.
        plan: knows its tools.
        context: the server's.
        add_generation_prompt: as in `Tokenizer.render_chat`; None for what goes with the next.
        continue_final_message: as there.
        variables: the request's `chat_template_kwargs`.
        effort: the request's `reasoning_effort`, for templates that read it, or have a switch.

    Raises:
        InvalidRequest: a message is malformed, or the chat template refuses something.
    """
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    given = plan.messages(messages)
    render = functools.partial(
        chat_prompt,
        tokenizer=plan.form.tokenizer,
        limits=context.limits,
        tools=plan.template_tools(),
        chat_template_kwargs={**_of_effort(effort, plan), **(variables or {})},
    )
    prompt = await render(
        given,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=bool(continue_final_message),
    )
    thoughts = plan.form.thoughts
    begun = None if thoughts is None else thoughts.begun_in(prompt.text)
    if thoughts is not None and begun is not None and begun.strip():
        # Only what stands in the answer's own turn is a thought: others may speak of the marker.
        before = given[:-1] if continue_final_message else given
        try:
            earlier = (await render(before, add_generation_prompt=False)).text
        except InvalidRequest:  # there is nothing before, or the template wants another end
            earlier = ""
        begun = thoughts.begun_in(prompt.text[_num_common(prompt.text, earlier) :])
    return ConversationPrompt(prompt.token_ids, begun)


def _num_common(text: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    if text.startswith(other):
        return len(other)
    pairs = zip(text, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(text))


def thinking_budget(given: int | None, effort: str | None, form: AnswerFormat) -> int | None:
    """How many tokens of thought a request allows; none at the effort `none`.

    A template that knows of efforts, or has a switch, sees to that itself.

    Args:
        given: the request's `thinking_token_budget`.
        effort: its `reasoning_effort`.
        form: how the model writes.
    """
    if given is not None or effort != "none" or form.thoughts is None:
        return given
    known = form.tokenizer.chat_variables
    return None if known.intersection(("reasoning_effort", *_SWITCHES)) else 0


def _of_effort(effort: str | None, plan: AnswerPlan) -> dict[str, Any]:
    """What a chat template gets to read of an effort; nothing, if it has no room for it."""
    known = plan.form.tokenizer.chat_variables
    if effort is None:
        return {}
    if "reasoning_effort" in known:
        return {"reasoning_effort": effort}
    return {switch: effort != "none" for switch in _SWITCHES if switch in known}
