"""The messages of a request, and what the model gets to read of them."""

from typing import Annotated, Any, Protocol

from pydantic import Field

from jaxserve.core.errors import InvalidRequest
from jaxserve.server.answer_plan import AnswerPlan
from jaxserve.server.context import ServerContext
from jaxserve.server.prompts import ChatPrompt, chat_prompt

# What is in a message is checked by `template_messages`, whichever API it came by.
Messages = Annotated[list[dict[str, Any]], Field(min_length=1)]


class Conversation(Protocol):
    """The fields of a request that make its prompt, beside the messages."""

    add_generation_prompt: bool | None
    continue_final_message: bool | None
    chat_template_kwargs: dict[str, Any] | None
    reasoning_effort: str | None


async def conversation_prompt(
    messages: list[dict[str, Any]], body: Conversation, plan: AnswerPlan, context: ServerContext
) -> ChatPrompt:
    """The prompt of a conversation, its tools included.

    Args:
        messages: in OpenAI's shape.
        body: the request.
        plan: knows its tools.
        context: the server's.

    Raises:
        InvalidRequest: a message is malformed, or the chat template refuses something.
    """
    begins_answer = body.add_generation_prompt
    if begins_answer is None:
        begins_answer = not body.continue_final_message
    return await chat_prompt(
        plan.messages(messages),
        plan.form.tokenizer,
        context.limits,
        add_generation_prompt=begins_answer,
        continue_final_message=bool(body.continue_final_message),
        tools=plan.template_tools(),
        chat_template_kwargs=_variables(body, plan),
    )


def _variables(body: Conversation, plan: AnswerPlan) -> dict[str, Any]:
    """What the chat template may read, among it OpenAI's `reasoning_effort`, if it does."""
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is None:
        return variables
    if "reasoning_effort" not in plan.form.tokenizer.chat_variables:
        raise InvalidRequest(
            "reasoning_effort is not supported: the model's chat template does not read it",
            param="reasoning_effort",
        )
    return {**variables, "reasoning_effort": body.reasoning_effort}
