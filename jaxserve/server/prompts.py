"""A caller's prompt as token ids, whichever protocol it came by."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.json_values import num_chars
from jaxserve.server.limits import RequestLimits
from jaxserve.tokenizers.base import ChatPrompt, Tokenizer
from jaxserve.tokenizers.messages import template_messages

# Encoding this much takes about a millisecond, all that other streams should have to wait.
MAX_INLINE_CHARS = 4096

T = TypeVar("T")


async def text_token_ids(
    text: str,
    tokenizer: Tokenizer,
    limits: RequestLimits,
    *,
    add_special_tokens: bool = True,
    param: str = "prompt",
) -> list[int]:
    """The token ids of a text; a long one is encoded on a thread, so that other streams go on.

    Args:
        text: the prompt.
        tokenizer: the served model's.
        limits: how long it may be.
        add_special_tokens: as in `Tokenizer.encode`.
        param: the request's parameter, for messages.

    Raises:
        InvalidRequest: the text is empty, too long, or not valid Unicode.
    """
    if not text:
        raise InvalidRequest("the prompt is empty", param=param)
    limits.check("max_prompt_chars", len(text), param)
    with _blaming(param):
        return await off_loop(
            len(text), lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens)
        )


def given_token_ids(ids: Sequence[int], max_model_len: int, *, param: str = "prompt") -> list[int]:
    """A prompt that came as token ids; the engine checks that they are of the vocabulary.

    Raises:
        InvalidRequest: there are none, or more than the context has room for: found before
            copying what may be millions.
    """
    if not ids:
        raise InvalidRequest("the prompt is empty", param=param)
    if len(ids) > max_model_len:
        raise InvalidRequest(
            f"the prompt has {len(ids)} tokens, the context only {max_model_len}", param=param
        )
    return list(ids)


async def chat_prompt(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    limits: RequestLimits,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> ChatPrompt:
    """A conversation's prompt, by the model's chat template.

    Args:
        messages: in OpenAI's shape, with "role" and "content".
        tokenizer: the served model's.
        limits: how long all texts together may be.
        add_generation_prompt, continue_final_message, tools, chat_template_kwargs: as in
            `Tokenizer.render_chat`.

    Raises:
        InvalidRequest: there are no messages, one is malformed, they are too long, or the
            template refuses them.
    """
    if not messages:
        raise InvalidRequest("the prompt is empty: there are no messages", param="messages")
    chat = template_messages(messages)
    size = num_chars([{**message, "role": ""} for message in chat])
    limits.check("max_prompt_chars", size, "messages")
    size += num_chars(tools) + num_chars(chat_template_kwargs)
    limits.check("max_prompt_chars", size, "messages, tools and chat_template_kwargs")

    def encode() -> ChatPrompt:
        return tokenizer.render_chat(
            chat,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )

    # Never here, however short it is: the template is a program, and takes what time it likes.
    with _blaming("messages"):
        return await asyncio.to_thread(encode)


async def chat_token_ids(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    limits: RequestLimits,
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """The token ids of a conversation without tools; see `chat_prompt`.

    Raises:
        InvalidRequest: as `chat_prompt`.
    """
    prompt = await chat_prompt(
        messages, tokenizer, limits, add_generation_prompt=add_generation_prompt
    )
    return prompt.token_ids


async def off_loop(num_chars: int, encode: Callable[[], T]) -> T:
    """Call a function: here if there is little to do, else on a thread."""
    return await asyncio.to_thread(encode) if num_chars > MAX_INLINE_CHARS else encode()


@contextlib.contextmanager
def _blaming(param: str) -> Iterator[None]:
    """Name a parameter in errors raised within it that name none."""
    try:
        yield
    except InvalidRequest as error:
        error.param = error.param or param
        raise
