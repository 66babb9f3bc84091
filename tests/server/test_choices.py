"""Several generations as one stream."""

import asyncio
import contextlib
from collections.abc import Callable

import pytest

from jaxserve.core.errors import InvalidRequest, QueueFull
from jaxserve.core.sampling_params import MAX_SEED, SamplingParams
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.outputs import TokenDelta
from jaxserve.server.choices import generate_choices

PROMPTS = [[1, 2, 3], [4, 5]]


async def tokens(engine: AsyncEngine, params: SamplingParams, n: int, **fields) -> list[list[int]]:
    prompts = fields.get("prompts", PROMPTS)
    got: list[list[TokenDelta]] = [[] for _ in range(n * len(prompts))]
    async for i, delta in generate_choices(engine, "r", prompts, params, n=n):
        got[i].append(delta)
    for deltas in got:
        assert [d.finish_reason is not None for d in deltas] == [False] * (len(deltas) - 1) + [True]
    return [[t for d in deltas for t in d.token_ids] for deltas in got]


def test_each_is_what_a_request_of_its_own_would_get(make_engine, wait_idle) -> None:
    async def main() -> None:
        engine = make_engine()
        several = await tokens(engine, SamplingParams(seed=7, max_tokens=9), 3)
        for p, prompt in enumerate(PROMPTS):
            for j in range(3):
                alone = SamplingParams(seed=7 + j, max_tokens=9)
                assert [several[p * 3 + j]] == await tokens(engine, alone, 1, prompts=[prompt])
        unseeded = await tokens(engine, SamplingParams(max_tokens=9), 3)
        assert len({tuple(t) for t in unseeded}) == 6
        await tokens(engine, SamplingParams(seed=MAX_SEED, max_tokens=2), 2)
        await wait_idle(engine)

    asyncio.run(main())


@pytest.mark.parametrize("n", [1, 4])
def test_closing_aborts_all(make_engine, wait_idle, n: int) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.005)
        stream = generate_choices(engine, "r", [[1]], SamplingParams(max_tokens=400), n=n)
        async with contextlib.aclosing(stream):
            await anext(stream)
        await wait_idle(engine)
        assert engine.load().num_aborted == n

    asyncio.run(main())


def one_prompt_is_bad(make_engine: Callable[..., AsyncEngine]) -> tuple[AsyncEngine, list]:
    return make_engine(), [[1], [2], [999999], [3]]


def the_queue_is_full(make_engine: Callable[..., AsyncEngine]) -> tuple[AsyncEngine, list]:
    return make_engine(max_waiting=2, max_num_seqs=1), [[1]] * 12


@pytest.mark.parametrize(
    ("setup", "error"), [(one_prompt_is_bad, InvalidRequest), (the_queue_is_full, QueueFull)]
)
def test_one_that_fails_ends_the_others(make_engine, wait_idle, setup, error) -> None:
    async def main() -> None:
        engine, prompts = setup(make_engine)
        with pytest.raises(error):
            async for _ in generate_choices(engine, "r", prompts, SamplingParams(max_tokens=400)):
                pass
        await wait_idle(engine)

    asyncio.run(main())


def test_a_slow_reader_gets_fewer_and_larger_deltas(make_engine) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.0005)
        counts = [0, 0]
        stream = generate_choices(engine, "r", [[1]], SamplingParams(max_tokens=300), n=2)
        async for i, delta in stream:
            counts[i] += 1
            if delta.finish_reason is None and counts[i] < 3:
                await asyncio.sleep(0.1)
        assert max(counts) < 250

    asyncio.run(main())
