"""Chat templates: Jinja2 programs that come with a model, run in a sandbox."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from jaxserve.core.errors import InvalidRequest
from jaxserve.tokenizers.control_marks import with_marks_as_they_are
from jaxserve.tokenizers.messages import template_messages

MAX_RENDERED_CHARS = 16 * 2**20
MAX_POWER_BITS = 4096

# What a template gets from the server, so that a caller's variables cannot be called so.
_OURS = (
    "messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token",
    "raise_exception", "strftime_now",
)  # fmt: skip
# Ends the message that is to be continued; the answer goes on where it stands. Not in any prompt.
_CUT = "\ue000<continue here>\ue000"


class ChatTemplate:
    """One compiled template, rendered as transformers does it.

    The rules of the dialect (trimmed blocks, `tojson` without HTML escapes,
    `raise_exception`, `strftime_now`, break and continue, `generation` blocks) are those of
    https://huggingface.co/docs/transformers/chat_templating.

    Args:
        source: the Jinja source.
        max_chars: a longer result is an error; a template is a program and could loop.

    Attributes:
        variables: names that the template reads and does not set: `messages`, `tools` if it
            knows of tools, and switches of its own such as `enable_thinking`.

    Raises:
        InvalidRequest: the source is not valid Jinja.
    """

    def __init__(self, source: str, max_chars: int = MAX_RENDERED_CHARS) -> None:
        environment = _Sandbox(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._max_chars = max_chars
        self._knows_developers = "developer" in source
        try:
            self._template = environment.from_string(source)
            tree = environment.parse(source)
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(tree))
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the model's chat template is broken: {error}") from error

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
            InvalidRequest: the template refuses the messages or fails on them, its result is
                longer than `max_chars`, it does not read the tools or one of the variables, or a
                message is not as `template_messages` wants it.
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
        text = self._generate({**self._checked(variables or {}, ours), **ours})
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

    def _generate(self, variables: Mapping[str, Any]) -> str:
        chunks, size = [], 0
        try:
            for chunk in self._template.generate(variables):
                size += len(chunk)
                if size > self._max_chars:
                    raise InvalidRequest(
                        f"the chat template's result exceeds {self._max_chars} characters"
                    )
                chunks.append(chunk)
        except InvalidRequest:
            raise
        except Exception as error:  # a template can fail in any way a program can
            raise InvalidRequest(f"the chat template refused the messages: {error}") from error
        return "".join(chunks)


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


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with a limit on the operators that make huge values of small ones."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        """Multiply and raise to powers, within reason."""
        if operator == "**":
            is_int = isinstance(left, int) and isinstance(right, int)
            too_large = is_int and left.bit_length() * right > MAX_POWER_BITS
        else:
            sizes = [len(v) if hasattr(v, "__len__") else v for v in (left, right)]
            repeats = any(hasattr(v, "__len__") for v in (left, right))
            too_large = repeats and sizes[0] * sizes[1] > MAX_RENDERED_CHARS
        if too_large:
            raise jinja2.exceptions.SecurityError(f"the result of {operator} would be too large")
        return super().call_binop(context, operator, left, right)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks training targets; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Replace the block with what is in it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return with_marks_as_they_are(text) if ensure_ascii else text


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
