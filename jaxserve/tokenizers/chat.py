"""Chat templates: what goes into them, and what comes of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.core.errors import InvalidRequest
from jaxserve.templates.dialect import MAX_RENDERED_CHARS
from jaxserve.templates.workers import rendered, template_variables
from jaxserve.tokenizers.messages import template_messages

# What a template gets from the server, so that a caller's variables cannot be called so.
_OURS = (
    "messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token",
    "raise_exception", "strftime_now",
)  # fmt: skip
# Ends the message that is to be continued; the answer goes on where it stands. Not in any prompt.
_CUT = "\ue000<continue here>\ue000"


class ChatTemplate:
    """A Jinja2 program that comes with a model, rendered as transformers does it.

    It runs in a process of its own, with a budget of time and memory: see `templates.workers`.

    Args:
        source: the Jinja source.
        max_chars: a longer result is an error.

    Attributes:
        variables: names that the template reads and does not set: `messages`, `tools` if it
            knows of tools, and switches of its own such as `enable_thinking`.

    Raises:
        InvalidRequest: the source is not valid Jinja, or compiling it overruns the budget.
    """

    def __init__(self, source: str, max_chars: int = MAX_RENDERED_CHARS) -> None:
        self._source = source
        self._max_chars = max_chars
        self._knows_developers = "developer" in source
        self.variables = template_variables(source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        bos_token: str,
        eos_token: str,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        special_tokens: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for a conversation.

        A `developer`, as newer models call the `system`, is one to templates that know no other.

        Args:
            messages: see `template_messages`.
            bos_token, eos_token: the tokens' names, empty where there are none.
            add_generation_prompt: end with the opening of the assistant's turn.
            continue_final_message: end within the last message, which is to be continued.
            tools: functions in OpenAI's shape.
            variables: what the template may read beside that.
            special_tokens: names of more tokens, by what the template calls them.

        Raises:
            InvalidRequest: the template refuses the messages, fails on them or overruns its
                budget, its result is longer than `max_chars`, it does not read the tools or one
                of the variables, or a message is not as `template_messages` wants it.
        """
        chat = template_messages(messages)
        if tools and "tools" not in self.variables:
            raise InvalidRequest("the model's chat template knows of no tools", param="tools")
        if not self._knows_developers:
            for message in chat:
                if message["role"] == "developer":
                    message["role"] = "system"
        if continue_final_message:
            _mark_cut(chat, add_generation_prompt)
        ours = {
            "messages": chat,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": bos_token,
            "eos_token": eos_token,
            "tools": list(tools) if tools else None,  # templates ask `tools is not none`
            "documents": None,
        }
        ours = {**(special_tokens or {}), **ours}
        given = {**self._checked(variables or {}, ours), **ours}
        text = rendered(self._source, given, self._max_chars)
        return _cut(text) if continue_final_message else text

    def _checked(self, variables: Mapping[str, Any], ours: Mapping[str, Any]) -> Mapping[str, Any]:
        for name in variables:
            where = f"chat_template_kwargs.{name}"
            if name in _OURS or name in ours:
                raise InvalidRequest(f"{where} is not for a request to set", param=where)
            if name not in self.variables:
                raise InvalidRequest(f"{where}: the model's chat template reads no such variable",
                                     param=where)  # fmt: skip
        return variables


def _mark_cut(chat: list[dict[str, Any]], add_generation_prompt: bool) -> None:
    if add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt contradict each other",
            param="continue_final_message",
        )
    if not chat or not chat[-1]["content"].strip() or chat[-1].get("tool_calls"):
        raise InvalidRequest(
            "continue_final_message needs a last message with a text and without tool calls",
            param="continue_final_message",
        )
    chat[-1]["content"] += _CUT


def _cut(text: str) -> str:
    start = text.rfind(_CUT)
    if start < 0:
        raise InvalidRequest(
            "continue_final_message: the chat template leaves the last message out",
            param="continue_final_message",
        )
    return text[:start]
