"""A caller's prompt as token ids, whichever protocol it came by."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from jaxserve.core.errors import InvalidRequest
from jaxserve.server.limits import RequestLimits
from jaxserve.tokenizers.base import Tokenizer

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


async def chat_token_ids(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    limits: RequestLimits,
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """The token ids of a conversation, by the model's chat template.

    Args:
        messages: each with "role" and "content".
        tokenizer: the served model's.
        limits: how long all contents together may be.
        add_generation_prompt: end with the opening of the assistant's turn.

    Raises:
        InvalidRequest: there are no messages, one has no role, they are too long, or the
            template refuses them.
    """
    if not messages:
        raise InvalidRequest("the prompt is empty: there are no messages", param="messages")
    if not all(message["role"] for message in messages):
        raise InvalidRequest("every chat message needs a role", param="messages")
    num_chars = sum(len(message["content"]) for message in messages)
    limits.check("max_prompt_chars", num_chars, "messages")
    return await off_loop(
        num_chars,
        lambda: tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt
        ),
    )


async def off_loop(num_chars: int, encode: Callable[[], T]) -> T:
    """Call a function: here if there is little to do, else on a thread."""
    return await asyncio.to_thread(encode) if num_chars > MAX_INLINE_CHARS else encode()
