"""From prompts to a call's deltas, as every front end streams them."""

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Sequence

from jaxserve.core.errors import Draining, InvalidRequest
from jaxserve.core.request import FinishReason
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.service_params import ServiceParams
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.outputs import TokenDelta
from jaxserve.server.choices import generate_choices
from jaxserve.server.context import ServerContext
from jaxserve.server.schema_check import SchemaCheck


async def stream_answers(
    context: ServerContext,
    engine: AsyncEngine,
    request_id: str,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    service: ServiceParams,
    *,
    n: int = 1,
    asks_max_tokens: bool,
) -> AsyncGenerator[tuple[int, TokenDelta], None]:
    """Generate `n` answers to each prompt; closing the iterator aborts all of them.

    What a caller asks for and the context has no room for is refused. A default is less: an answer
    whose request does not say ends where the context does, and before that at the server's
    default, so that none runs on for minutes unasked.

    Args:
        context: the server's.
        engine, request_id, prompts, params, service, n: as in `generate_choices`.
        asks_max_tokens: whether `params.max_tokens` is the caller's, not a default.

    Yields:
        (index, delta), as `generate_choices`.

    Raises:
        InvalidRequest: `max_tokens` is asked for and does not fit behind a prompt.
        Draining: after the last delta of an answer that the server's end has cut off, so that
            nobody takes it for a whole one.
        Others: as `AsyncEngine.generate`.
    """
    if params.max_tokens is None:
        params = dataclasses.replace(params, max_tokens=context.limits.default_max_tokens)
    elif asks_max_tokens:
        _check_room(params.max_tokens, prompts, engine.model_info.max_model_len)
    count = len(prompts) * n
    ids = [f"{request_id}-{i}" for i in range(count)] if count > 1 else [request_id]
    choices = generate_choices(engine, request_id, prompts, params, service, n=n)
    count_mismatch = context.observability.metrics.count_mismatch
    check = SchemaCheck(request_id, params, engine.tokenizer, count_mismatch)
    with context.answering(), context.several(request_id, ids):
        async with contextlib.aclosing(choices):
            async for index, delta in choices:
                await check.take(index, delta)
                yield index, delta
                if delta.finish_reason is FinishReason.ABORT and not engine.is_ready:
                    raise Draining("the server stopped before the answer was complete")


def _check_room(max_tokens: int, prompts: Sequence[Sequence[int]], max_model_len: int) -> None:
    """Refuse more tokens than fit behind the longest prompt, unless that has no room itself."""
    longest = max(map(len, prompts), default=0)
    if longest < max_model_len < longest + max_tokens:
        raise InvalidRequest(
            f"max_tokens {max_tokens} is too large: the context has {max_model_len} tokens, the "
            f"prompt {longest}, which leaves {max_model_len - longest} for an answer",
            param="max_tokens",
        )
