"""Five hundred callers at once, many of them rude: the good are served, nothing is left."""

import asyncio
import random

import grpc
import pytest

from jaxserve.server.v1 import jaxserve_pb2 as pb

NUM_REQUESTS = 500
CODES = grpc.StatusCode
MALFORMED = [
    (pb.GenerateRequest(text=""), CODES.INVALID_ARGUMENT),
    (pb.GenerateRequest(token_ids=pb.TokenIds()), CODES.INVALID_ARGUMENT),
    (pb.GenerateRequest(text="x", sampling_params={"max_tokens": -3}), CODES.INVALID_ARGUMENT),
    (pb.GenerateRequest(text="x", sampling_params={"top_p": 0.0}), CODES.INVALID_ARGUMENT),
    (pb.GenerateRequest(text="x" * 100_000), CODES.INVALID_ARGUMENT),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 100_000)), CODES.INVALID_ARGUMENT),
    (b"\x1a\x02\xff\xfe", CODES.INVALID_ARGUMENT),  # text that is not UTF-8
    (pb.GenerateRequest(text="x", model="unknown"), CODES.NOT_FOUND),
]


@pytest.mark.parametrize("num_pages", [2000, 150])  # 150: room for one long request or so
def test_storm(make_engine, serving, make_request, expected, wait_idle, num_pages: int) -> None:
    rng = random.Random(num_pages)

    def raw(request: pb.GenerateRequest | bytes) -> bytes:
        return request if isinstance(request, bytes) else request.SerializeToString()

    async def good(s) -> None:
        prompt = [rng.randrange(256) for _ in range(rng.randint(1, 200))]
        max_tokens = rng.randint(1, 60)
        messages = await s.ask(make_request(prompt, max_tokens=max_tokens))
        assert [t for m in messages for t in m.token_ids] == expected(prompt, max_tokens)
        assert messages[-1].usage.prompt_tokens == len(prompt)

    async def cancelled(s) -> None:
        prompt = [rng.randrange(256) for _ in range(rng.randint(1, 200))]
        call = s.stub.Generate(make_request(prompt, max_tokens=rng.randint(1, 60)))
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

    async def main() -> None:
        engine = make_engine(num_pages=num_pages, max_num_seqs=64)
        async with serving(engine) as s, asyncio.timeout(60):
            callers = []
            for i in range(NUM_REQUESTS):
                if i % 3 == 0:
                    callers.append(cancelled(s))
                elif i % 5 == 0:
                    callers.append(bad(s, *rng.choice(MALFORMED)))
                else:
                    callers.append(good(s))
            rng.shuffle(callers)
            await asyncio.gather(*callers)
            await wait_idle(engine)
            assert engine.is_ready
            load = await s.stub.GetLoad(pb.GetLoadRequest())
            assert load.num_finished + load.num_aborted <= NUM_REQUESTS
            assert load.num_aborted > 0
            if num_pages == 150:
                assert load.num_preemptions > 0
            assert not s.server._servicer._num_streams

    asyncio.run(main())
