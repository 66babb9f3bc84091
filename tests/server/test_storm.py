"""Hundreds of callers at once, many of them rude: the good are served, nothing is left."""

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from jaxserve.core.config import EngineConfig
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.build import build_engine
from jaxserve.server.v1 import jaxserve_pb2 as pb
from tests.waiting import PATIENCE

Draw = Callable[[random.Random], tuple[list[int], list[int]]]  # a prompt, and its greedy answer

REFERENCES = Path(__file__).parents[1] / "references"
CODES = grpc.StatusCode
MALFORMED = [
    (pb.GenerateRequest(text=""), CODES.INVALID_ARGUMENT),
    (pb.GenerateRequest(token_ids=pb.TokenIds()), CODES.INVALID_ARGUMENT),
    (pb.GenerateRequest(text="x", sampling_params={"max_tokens": -3}), CODES.INVALID_ARGUMENT),
    (pb.GenerateRequest(text="x", sampling_params={"top_p": -0.1}), CODES.INVALID_ARGUMENT),
    (pb.GenerateRequest(text="x" * 100_000), CODES.INVALID_ARGUMENT),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 100_000)), CODES.INVALID_ARGUMENT),
    (b"\x1a\x02\xff\xfe", CODES.INVALID_ARGUMENT),  # text that is not UTF-8
    (pb.GenerateRequest(text="x", model="unknown"), CODES.NOT_FOUND),
]


async def storm(
    engine: AsyncEngine, draw: Draw, serving, make_request, rng: random.Random, num_requests: int
) -> None:
    """Good, cancelling and malformed calls all at once; then nothing may be left of them."""

    def raw(request: pb.GenerateRequest | bytes) -> bytes:
        return request if isinstance(request, bytes) else request.SerializeToString()

    def ask_for(prompt: list[int], answer: list[int]) -> pb.GenerateRequest:
        request = make_request(prompt, max_tokens=len(answer))
        request.sampling_params.ignore_eos = True
        return request

    async def good(s) -> None:
        prompt, answer = draw(rng)
        messages = await s.ask(ask_for(prompt, answer))
        assert [t for m in messages for t in m.token_ids] == answer
        assert messages[-1].usage.prompt_tokens == len(prompt)

    async def cancelled(s) -> None:
        call = s.stub.Generate(ask_for(*draw(rng)))
        if rng.random() < 0.5:
            await asyncio.sleep(rng.random())
        else:
            for _ in range(rng.randint(0, 20)):
                if not await call.read():  # the end
                    break
        call.cancel()
        assert await call.code() in (CODES.OK, CODES.CANCELLED)

    async def bad(s, request: pb.GenerateRequest | bytes, code: grpc.StatusCode) -> None:
        call = s.channel.unary_stream("/jaxserve.v1.Jaxserve/Generate", raw)(request)
        with pytest.raises(grpc.aio.AioRpcError):
            _ = [message async for message in call]
        assert await call.code() is code

    async with serving(engine) as s:
        callers = []
        for i in range(num_requests):
            if i % 3 == 0:
                callers.append(cancelled(s))
            elif i % 5 == 0:
                callers.append(bad(s, *rng.choice(MALFORMED)))
            else:
                callers.append(good(s))
        rng.shuffle(callers)
        await asyncio.gather(*callers)
        assert engine.is_ready
        load = await s.stub.GetLoad(pb.GetLoadRequest())
        assert load.num_finished + load.num_aborted <= num_requests
        assert load.num_aborted > 0
        assert not s.server._context._num_answering


@pytest.mark.parametrize("num_pages", [2000, 150])  # 150: room for one long request or so
def test_storm(make_engine, serving, make_request, expected, wait_idle, num_pages: int) -> None:
    def draw(rng: random.Random) -> tuple[list[int], list[int]]:
        prompt = [rng.randrange(256) for _ in range(rng.randint(1, 200))]
        return prompt, expected(prompt, rng.randint(1, 60))

    async def main() -> None:
        engine = make_engine(num_pages=num_pages, max_num_seqs=64)
        async with asyncio.timeout(10 * PATIENCE):
            await storm(engine, draw, serving, make_request, random.Random(num_pages), 500)
            await wait_idle(engine)
        if num_pages == 150:
            assert engine.load().num_preemptions > 0

    asyncio.run(main())


@pytest.mark.slow
def test_storm_on_the_demo_model(
    smollm2_gguf: Path, program_cache_dir: Path, serving, make_request, wait_idle
) -> None:
    """The same over SmolLM2, in a pool of few pages; answers are those of transformers."""
    data = json.loads((REFERENCES / "smollm2-135m.json").read_text())
    prompts = [p for p in data["prompts"] if len(p["prompt_token_ids"]) <= 150]
    assert len(prompts) >= 8

    def draw(rng: random.Random) -> tuple[list[int], list[int]]:
        prompt = rng.choice(prompts)
        told = rng.randint(0, 30)  # tokens of the answer that the prompt gives away
        answer = prompt["output_token_ids"]
        return prompt["prompt_token_ids"] + answer[:told], answer[told : told + rng.randint(1, 24)]

    engine = build_engine(
        EngineConfig(
            model=str(smollm2_gguf), max_model_len=256, max_num_seqs=32, num_pages=128,
            max_num_batched_tokens=256, page_size=16, token_buckets="32,256",
            row_buckets="32",
            compilation_cache_dir=str(program_cache_dir),
        ),
        progress=False,
    )  # fmt: skip

    async def main() -> None:
        async with asyncio.timeout(10 * PATIENCE):
            await storm(engine, draw, serving, make_request, random.Random(5), 150)
            await wait_idle(engine)
        assert engine.load().compiles_after_ready == 0

    try:
        asyncio.run(main())
    finally:
        engine.shutdown()
