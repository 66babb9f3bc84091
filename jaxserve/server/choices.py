"""Several answers as one stream: `n` choices to a prompt, or to each of many prompts."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Sequence

from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.service_params import ServiceParams
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.mailbox import joined
from jaxserve.engine.outputs import TokenDelta
from jaxserve.engine.records import EngineRecords

Choices = AsyncGenerator[tuple[int, TokenDelta], None]


async def generate_choices(
    engine: AsyncEngine,
    request_id: str,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    service: ServiceParams | None = None,
    *,
    n: int = 1,
) -> Choices:
    """Generate `n` answers to each prompt at once; closing the iterator aborts all of them.

    The j-th answer to a prompt has the seed `params.seed + j`, so it is the one that a request
    of its own with that seed would get. They share the prompt's KV through the prefix cache, and
    its log-probabilities, if they are asked for.

    Args:
        engine: serves them.
        request_id: of the only request; with several, `request_id-i` is that of choice i.
        prompts: token ids of each.
        params: for all of them.
        service: for all of them.
        n: answers to each prompt.

    Yields:
        (i, delta): the answer j to prompt p is choice i = p * n + j. The deltas of one choice
        come in order; a reader that is slow gets fewer and larger ones.

    Raises:
        What `AsyncEngine.generate` raises, of any of the requests; the others are aborted.
    """
    requests = [(prompt, params.of_answer(j)) for prompt in prompts for j in range(n)]
    ends = _Ends(engine.records, len(prompts), n)
    if len(requests) == 1:
        deltas = engine.generate(request_id, *requests[0], service)
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                ends.take(0, delta)
                yield 0, delta
        return
    streams = [
        engine.generate(f"{request_id}-{i}", prompt, nth_params, service)
        for i, (prompt, nth_params) in enumerate(requests)
    ]
    merged = _merged(streams)
    if n > 1 and params.prompt_logprobs is not None and params.max_tokens != 0:
        merged = _with_prompt_logprobs(merged, n)
    async with contextlib.aclosing(merged):
        async for item in merged:
            ends.take(*item)
            yield item


async def _with_prompt_logprobs(choices: Choices, n: int) -> Choices:
    """Give each prompt's log-probabilities, which come with its first answer, to the others, too.

    What comes of those before that is held back.
    """
    scores: dict[int, tuple[TokenLogprobs, ...] | None] = {}
    held: dict[int, dict[int, list[TokenDelta]]] = {}
    begun: set[int] = set()
    async with contextlib.aclosing(choices):
        async for index, delta in choices:
            prompt = index // n
            if not index % n:
                scores.setdefault(prompt, delta.prompt_logprobs)
                yield index, delta
                for other, deltas in held.pop(prompt, {}).items():
                    begun.add(other)
                    yield other, dataclasses.replace(joined(deltas), prompt_logprobs=scores[prompt])
            elif prompt not in scores:
                held.setdefault(prompt, {}).setdefault(index, []).append(delta)
            elif index in begun:
                yield index, delta
            else:
                begun.add(index)
                yield index, dataclasses.replace(delta, prompt_logprobs=scores[prompt])


class _Ends:
    """Tells an engine's records of each prompt whose answers have all ended by themselves."""

    def __init__(self, records: EngineRecords, num_prompts: int, n: int) -> None:
        self._records = records
        self._n = n
        self._lengths: list[list[int]] = [[] for _ in range(num_prompts)]

    def take(self, index: int, delta: TokenDelta) -> None:
        """Look at the next delta of a choice."""
        if delta.finish_reason is None or not delta.finish_reason.is_natural:
            return
        lengths = self._lengths[index // self._n]
        lengths.append(delta.num_output_tokens)
        if len(lengths) == self._n:
            self._records.prompt_answered(self._n, max(lengths))


async def _merged(streams: Sequence[AsyncGenerator[TokenDelta, None]]) -> Choices:
    # Bounded: with a slow reader the tasks wait, and the engine joins what queues up behind them.
    ready: asyncio.Queue[tuple[int, TokenDelta | BaseException | None]] = asyncio.Queue(
        len(streams)
    )

    async def pump(i: int, stream: AsyncGenerator[TokenDelta, None]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for delta in stream:
                    await ready.put((i, delta))
        except Exception as error:
            await ready.put((i, error))
        else:
            await ready.put((i, None))

    tasks = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            i, item = await ready.get()
            if isinstance(item, TokenDelta):
                yield i, item
            elif item is None:
                num_open -= 1
            else:
                raise item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
