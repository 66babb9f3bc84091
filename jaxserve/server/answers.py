"""From prompts to a call's deltas, as every front end streams them."""

import contextlib
from collections.abc import AsyncGenerator, Sequence

from jaxserve.core.errors import Draining
from jaxserve.core.request import FinishReason
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.service_params import ServiceParams
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.outputs import TokenDelta
from jaxserve.server.choices import generate_choices
from jaxserve.server.context import ServerContext


async def stream_answers(
    context: ServerContext,
    engine: AsyncEngine,
    request_id: str,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    service: ServiceParams,
    *,
    n: int = 1,
) -> AsyncGenerator[tuple[int, TokenDelta], None]:
    """Generate `n` answers to each prompt; closing the iterator aborts all of them.

    Yields:
        (index, delta), as `generate_choices`.

    Raises:
        Draining: after the last delta of an answer that the server's end has cut off, so that
            nobody takes it for a whole one.
        Others: as `AsyncEngine.generate`.
    """
    count = len(prompts) * n
    ids = [f"{request_id}-{i}" for i in range(count)] if count > 1 else [request_id]
    choices = generate_choices(engine, request_id, prompts, params, service, n=n)
    with context.answering(), context.several(request_id, ids):
        async with contextlib.aclosing(choices):
            async for index, delta in choices:
                yield index, delta
                if delta.finish_reason is FinishReason.ABORT and not engine.is_ready:
                    raise Draining("the server stopped before the answer was complete")
